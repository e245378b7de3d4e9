"""The few requests to the API server that the installer makes, as the Pod's service account."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.parse
from pathlib import Path
from typing import Any, Protocol

from crucible.nodes.problems import InconclusiveError

Object = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_SECONDS = 10


class ApiError(InconclusiveError):
    """The API server refused or did not answer; `status` is 0 for no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the API server: {message}" if not status else f"the API server said {status}: {message}")
        self.status = status


class Api(Protocol):
    """What the installer needs of the cluster."""

    def get(self, path: str, **query: str) -> Object:
        """Return the object, or list, at the path."""

    def create(self, path: str, body: Object) -> Object:
        """Create an object in the collection at the path."""

    def patch(self, path: str, body: Object, kind: str) -> Object:
        """Patch the object at the path; `kind` is a media type."""

    def delete(self, path: str) -> None:
        """Delete the object at the path at once; that it is gone already is no error."""


class ServiceAccountApi:
    """`Api` over HTTPS. A connection per request: they are rare, and the token on disk is renewed now and then."""

    def __init__(self, host: str, port: int, credentials: Path = _SERVICE_ACCOUNT) -> None:
        self._address = (host, port)
        self._credentials = credentials
        self._context = ssl.create_default_context(cafile=str(credentials / "ca.crt"))
        # Strict since Python 3.13, which refuses the certificates of many clusters for lack of an Authority Key Identifier.
        self._context.verify_flags &= ~ssl.VERIFY_X509_STRICT

    @classmethod
    def of_this_pod(cls) -> ServiceAccountApi:
        """Return the API server of the cluster that this Pod runs in."""
        return cls(os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))

    def get(self, path: str, **query: str) -> Object:
        """Return the object, or list, at the path."""
        return self._request("GET", f"{path}?{urllib.parse.urlencode(query)}" if query else path)

    def create(self, path: str, body: Object) -> Object:
        """Create an object in the collection at the path."""
        return self._request("POST", path, body, "application/json")

    def patch(self, path: str, body: Object, kind: str) -> Object:
        """Patch the object at the path; `kind` is a media type."""
        return self._request("PATCH", path, body, kind)

    def delete(self, path: str) -> None:
        """Delete the object at the path at once; that it is gone already is no error."""
        try:
            self._request("DELETE", f"{path}?gracePeriodSeconds=0")
        except ApiError as error:
            if error.status != http.HTTPStatus.NOT_FOUND:
                raise

    def _request(self, method: str, path: str, body: Object | None = None, kind: str = "") -> Object:
        connection = http.client.HTTPSConnection(*self._address, timeout=_TIMEOUT_SECONDS, context=self._context)
        headers = {"Authorization": f"Bearer {(self._credentials / 'token').read_text('ascii').strip()}"}
        if kind:
            headers["Content-Type"] = kind
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
            answer: Object = json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiError(0, f"{method} {path}: {error}") from error
        finally:
            connection.close()
        if response.status >= http.HTTPStatus.BAD_REQUEST:
            raise ApiError(response.status, str(answer.get("message", response.reason)))
        return answer
