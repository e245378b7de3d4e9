"""The Kubernetes API over HTTP: objects as they travel, errors by what they mean, streams that notice a dead peer.

Written over httpx since no client library serves here: the generated ones weigh 50 MB in every image and take 0.6 s to import, the
light ones neither ask for bookmarks nor read a log as bytes (ADR 0007). It knows no kind of object but by its path, decides nothing, and
repeats nothing: whoever calls knows whether a call may be made again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import ssl
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import orjson

from crucible import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping

    from crucible.settings import KubernetesSettings

Object = dict[str, Any]
Objects = list[Object]

_CONNECT_SECONDS = 2.0
# A healthy API server answers in milliseconds; one that is paused or overloaded is asked again by whoever needs it.
_READ_SECONDS = 10.0
_WINDOW_GRACE_SECONDS = 3.0
_PAGE = 500
_JSON = "application/json"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
# Kubernetes' own place for a Pod's identity; tokens are rotated there, so the file is read again this often.
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_SECONDS = 30.0
# A peer that vanished without a word (a power cut) is noticed in about 10 s, also on a stream that has nothing to say.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, option, value)
        for option, value in (
            (getattr(socket, "TCP_KEEPIDLE", None), 4),
            (getattr(socket, "TCP_KEEPINTVL", None), 2),
            (getattr(socket, "TCP_KEEPCNT", None), 3),
        )
        if option is not None
    ),
)
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


class KubernetesConfigError(Exception):
    """There is no usable way to an API server; the message says what was looked for and what to do."""


class ApiError(Exception):
    """The API server refused. `status` is HTTP's, `reason` Kubernetes' word (`NotFound`, `Forbidden`, ...), `message` for people."""

    def __init__(self, status: int, reason: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.details: Mapping[str, Any] = details or {}

    @property
    def not_found(self) -> bool:
        """There is no such object."""
        return self.status == 404

    @property
    def already_exists(self) -> bool:
        """An object of that name is there already."""
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """The object has changed since it was read, or is not the one that was meant."""
        return self.status == 409 and self.reason != "AlreadyExists"

    @property
    def quota_exceeded(self) -> bool:
        """A ResourceQuota has no room now."""
        return self.status == 403 and "exceeded quota" in self.message

    @property
    def gone(self) -> bool:
        """The resource version is too old to go on from: list again."""
        return self.status == 410 or self.reason in ("Expired", "Gone")

    @property
    def transient(self) -> bool:
        """The same call may succeed later: throttled, overloaded, or no answer at all."""
        return self.status in _TRANSIENT

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the API server wants to be asked again, if it said so."""
        seconds = self.details.get("retryAfterSeconds")
        return float(seconds) if isinstance(seconds, int | float) else None


class ApiUnreachableError(ApiError):
    """No answer: refused, timed out, or broken off. Whether the call took effect is not known."""

    def __init__(self, message: str) -> None:
        super().__init__(0, "Unreachable", message)

    @property
    def transient(self) -> bool:
        """It may be back at any time."""
        return True


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, by where it is found."""

    prefix: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As it stands in an object's `apiVersion`."""
        return self.prefix.removeprefix("/apis/").removeprefix("/api/")

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the URL's path: of one object, or of all in a namespace (None: in all namespaces)."""
        parts = [self.prefix]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


PODS = Resource("/api/v1", "pods", "Pod")
CONFIG_MAPS = Resource("/api/v1", "configmaps", "ConfigMap")
NODES = Resource("/api/v1", "nodes", "Node", namespaced=False)
NAMESPACES = Resource("/api/v1", "namespaces", "Namespace", namespaced=False)
EVENTS = Resource("/api/v1", "events", "Event")
RESOURCE_QUOTAS = Resource("/api/v1", "resourcequotas", "ResourceQuota")
JOBS = Resource("/apis/batch/v1", "jobs", "Job")
LEASES = Resource("/apis/coordination.k8s.io/v1", "leases", "Lease")
RUNTIME_CLASSES = Resource("/apis/node.k8s.io/v1", "runtimeclasses", "RuntimeClass", namespaced=False)


# --- how to reach it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """Where an API server is, and who we are to it."""

    server: str
    tls: ssl.SSLContext | bool = True
    token_file: Path | None = None
    token: str | None = field(default=None, repr=False)


def in_cluster(environ: Mapping[str, str] = os.environ, folder: Path = _SERVICE_ACCOUNT) -> Endpoint:
    """Return the API server of the cluster that this Pod runs in, as the Pod's service account.

    Raises:
        KubernetesConfigError: this is not a Pod, or one without a token.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    token, authority = folder / "token", folder / "ca.crt"
    if not host or not token.exists():
        raise KubernetesConfigError(
            "this does not run in a Pod with a service account token; name a kubeconfig in CRUCIBLE_KUBERNETES__KUBECONFIG"
        )
    address = f"[{host}]" if ":" in host else host
    return Endpoint(f"https://{address}:{port}", _trust(authority), token_file=token)


def from_kubeconfig(path: Path) -> Endpoint:
    """Return what the current context of a kubeconfig names: a client certificate or a token.

    Raises:
        KubernetesConfigError: it cannot be read, or says something that is not supported here (the message says what).
    """
    import yaml  # noqa: PLC0415 - only people's machines have kubeconfigs

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        context = _named(document, "contexts", document["current-context"])["context"]
        cluster = _named(document, "clusters", context["cluster"])["cluster"]
        user = _named(document, "users", context["user"])["user"]
        server = str(cluster["server"]).rstrip("/")
        return Endpoint(
            server, _tls(cluster, user, path.parent), _path(user, "tokenFile", path.parent), user.get("token")
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ssl.SSLError, ValueError) as error:
        raise KubernetesConfigError(f"{path}: is not a kubeconfig that can be used here: {error!r}") from error


def _named(document: Object, section: str, name: str) -> Object:
    for entry in document[section]:
        if entry["name"] == name:
            return dict(entry)
    raise KeyError(f"{section}: {name}")


def _path(entry: Object, key: str, folder: Path) -> Path | None:
    return folder / entry[key] if entry.get(key) else None


def _trust(authority: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority) if authority else None)
    # From Python 3.13 on the default is stricter than the certificates of many clusters, which lack a key identifier (RFC 5280, 4.2.1.1).
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _tls(cluster: Object, user: Object, folder: Path) -> ssl.SSLContext | bool:
    if "exec" in user or "auth-provider" in user:
        raise ValueError(
            "its user signs in with a plug-in; give the service a service account token or a client certificate"
        )
    if not str(cluster["server"]).startswith("https:"):
        return False
    context = _trust()
    if data := cluster.get("certificate-authority-data"):
        context.load_verify_locations(cadata=base64.b64decode(data).decode())
    elif file := _path(cluster, "certificate-authority", folder):
        context.load_verify_locations(cafile=str(file))
    if data := user.get("client-certificate-data"):
        # The ssl module reads certificates from files alone.
        with tempfile.NamedTemporaryFile() as certificate, tempfile.NamedTemporaryFile() as key:
            certificate.write(base64.b64decode(data))
            key.write(base64.b64decode(user["client-key-data"]))
            certificate.flush()
            key.flush()
            context.load_cert_chain(certificate.name, key.name)
    elif certificate_path := _path(user, "client-certificate", folder):
        context.load_cert_chain(certificate_path, _path(user, "client-key", folder))
    return context


class _Token(httpx.Auth):
    """Sends the token, read again from its file now and then, since Kubernetes rotates it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._token = endpoint.token
        self._read_at = float("-inf")

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        file = self._endpoint.token_file
        if file and time.monotonic() - self._read_at > _TOKEN_SECONDS:
            self._token = file.read_text(encoding="ascii").strip()
            self._read_at = time.monotonic()
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


# --- the client -----------------------------------------------------------------------------------------------------------


class KubernetesApi:
    """One API server. Close it at the end, or use it as a context manager.

    Every method raises `ApiError` where the API server refuses and `ApiUnreachableError` where it does not answer.

    Args:
        endpoint: where it is.
        user_agent: how the API server's audit log names us.
    """

    def __init__(self, endpoint: Endpoint, user_agent: str = "crucible") -> None:
        self.server = endpoint.server
        # As many connections as are wanted: each followed log holds one.
        transport = httpx.AsyncHTTPTransport(
            verify=endpoint.tls,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            socket_options=list(_KEEPALIVE),
        )
        self._http = httpx.AsyncClient(
            base_url=endpoint.server,
            transport=transport,
            auth=_Token(endpoint),
            headers={"User-Agent": user_agent, "Accept": _JSON},
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        )

    @classmethod
    def from_settings(cls, settings: KubernetesSettings, user_agent: str = "crucible") -> Self:
        """Return a client of the cluster that the settings name.

        Raises:
            KubernetesConfigError: there is none.
        """
        endpoint = from_kubeconfig(settings.kubeconfig) if settings.kubeconfig else in_cluster()
        return cls(endpoint, user_agent)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    # -- objects

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """Read one object."""
        return await self._call("get", resource, "GET", resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: str | None = None,
        fields: str | None = None,
        metadata_only: bool = False,
    ) -> tuple[Objects, str]:
        """Read all objects that the selectors choose (or only their metadata), and the resource version from which a watch goes on."""
        accept = _METADATA_ONLY if metadata_only else None
        params = _given(labelSelector=labels, fieldSelector=fields, limit=_PAGE)
        accept = _METADATA_ONLY if metadata_only else _JSON
        items: Objects = []
        while True:
            page = await self._call("list", resource, "GET", resource.path(namespace), params=params, accept=accept)
            items += page.get("items") or []
            metadata = page["metadata"]
            if not metadata.get("continue"):
                return items, metadata["resourceVersion"]
            params["continue"] = metadata["continue"]

    async def create(
        self, resource: Resource, body: Object, namespace: str | None = None, *, dry_run: bool = False
    ) -> Object:
        """Create an object; `dry_run` asks whether it would be taken. Raises an error that is `already_exists` if it is there."""
        params = _given(dryRun="All" if dry_run else None)
        return await self._call("create", resource, "POST", resource.path(namespace), body=body, params=params)

    async def patch(
        self,
        resource: Resource,
        name: str,
        patch: Object | Objects,
        namespace: str | None = None,
        *,
        subresource: str | None = None,
        strategic: bool = False,
    ) -> Object:
        """Change an object: a dict is merged into it (RFC 7396), a list is a sequence of operations (RFC 6902).

        `metadata.resourceVersion` in a merge makes it conditional, `metadata.uid` too; otherwise the last writer wins. A `strategic`
        merge is Kubernetes' own, which can add to a list and take from it without knowing the rest.
        """
        kind = "application/json-patch+json" if isinstance(patch, list) else "application/merge-patch+json"
        if strategic:
            kind = "application/strategic-merge-patch+json"
        path = resource.path(namespace, name, subresource)
        return await self._call("patch", resource, "PATCH", path, body=patch, content_type=kind)

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        propagation: str | None = None,
        grace_seconds: int | None = None,
        uid: str | None = None,
    ) -> None:
        """Delete an object.

        Args:
            resource: its kind.
            name: its name.
            namespace: where it is.
            propagation: `Background`, `Foreground` or `Orphan` for what it owns.
            grace_seconds: for a Pod, how long its processes may take to end; 0 removes it without asking its node.
            uid: delete only this very object; another of the same name is a `conflict`.
        """
        body = _given(
            apiVersion="v1",
            kind="DeleteOptions",
            propagationPolicy=propagation,
            gracePeriodSeconds=grace_seconds,
            preconditions={"uid": uid} if uid else None,
        )
        await self._call("delete", resource, "DELETE", resource.path(namespace, name), body=body)

    async def ask(self, path: str) -> Any:
        """Read any path of the API, such as `/version`."""
        return await self._send("get", path.rpartition("/")[2], "GET", path)

    async def review(self, path: str, body: Object) -> Object:
        """Post a question that is answered and not stored, such as a SubjectAccessReview."""
        return dict(await self._send("create", path.rpartition("/")[2], "POST", path, body=body))

    # -- streams

    @contextlib.asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        labels: str | None = None,
        fields: str | None = None,
        window_seconds: int = 10,
    ) -> AsyncIterator[AsyncIterator[tuple[str, Object]]]:
        """Open a stream of `(ADDED | MODIFIED | DELETED | BOOKMARK, object)` since a resource version; it ends after a window.

        The window is short so that a connection that died in silence is noticed soon; going on from the last resource version
        costs the API server next to nothing.

        Raises:
            ApiError: among others one that is `gone`: list again.
        """
        params = _given(
            watch="true",
            allowWatchBookmarks="true",
            resourceVersion=resource_version,
            labelSelector=labels,
            fieldSelector=fields,
            timeoutSeconds=window_seconds,
        )
        timeout = httpx.Timeout(window_seconds + _WINDOW_GRACE_SECONDS, connect=_CONNECT_SECONDS)
        async with self._stream("watch", resource.plural, resource.path(namespace), params, timeout) as response:
            yield _changes(response)

    @contextlib.asynccontextmanager
    async def log(
        self, pod: str, namespace: str, container: str, *, follow: bool
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a container's log, from its start, as bytes; `follow` until the container has ended."""
        params = _given(container=container, follow="true" if follow else None)
        timeout = httpx.Timeout(None if follow else _READ_SECONDS, connect=_CONNECT_SECONDS)
        path = PODS.path(namespace, pod, "log")
        async with self._stream("log", "pods", path, params, timeout) as response:
            yield _bytes(response)

    # -- how calls are made

    async def _call(self, verb: str, resource: Resource, method: str, path: str, **how: Any) -> Object:
        return dict(await self._send(verb, resource.plural, method, path, **how))

    async def _send(
        self,
        verb: str,
        plural: str,
        method: str,
        path: str,
        *,
        body: Object | Objects | None = None,
        params: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str | None = None,
    ) -> Any:
        content = None if body is None else orjson.dumps(body)
        headers = _given(**{"Content-Type": content_type if content is not None else None, "Accept": accept})
        with _counted(verb, plural) as count, _network_errors():
            response = await self._http.request(method, path, content=content, params=params, headers=headers)
            count.code = str(response.status_code)
        if response.is_error:
            raise _refusal_of(response)
        return orjson.loads(response.content)

    @contextlib.asynccontextmanager
    async def _stream(
        self, verb: str, plural: str, path: str, params: Mapping[str, Any], limit: httpx.Timeout
    ) -> AsyncIterator[httpx.Response]:
        with _network_errors():
            request = self._http.build_request("GET", path, params=params, timeout=limit)
            with _counted(verb, plural) as count:
                response = await self._http.send(request, stream=True)
                count.code = str(response.status_code)
            try:
                if response.is_error:
                    await response.aread()
                    raise _refusal_of(response)
                yield response
            finally:
                await response.aclose()


@dataclass
class _Count:
    code: str = "none"


@contextlib.contextmanager
def _counted(verb: str, plural: str) -> Generator[_Count, None, None]:
    """Time a call until its answer begins."""
    count, began = _Count(), time.perf_counter()
    try:
        yield count
    finally:
        metrics.KUBERNETES_SECONDS.labels(verb, plural, count.code).observe(time.perf_counter() - began)


@contextlib.contextmanager
def _network_errors() -> Generator[None, None, None]:
    try:
        yield
    except (httpx.HTTPError, OSError, ssl.SSLError) as error:
        raise ApiUnreachableError(str(error) or type(error).__name__) from error


def _refusal_of(response: httpx.Response) -> ApiError:
    try:
        status = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        status = {}
    if not isinstance(status, dict) or "message" not in status:
        # Not Kubernetes' own answer: a proxy's, or plain text from the API server's outer layers.
        status = {"message": response.text[:500] or response.reason_phrase, "reason": response.reason_phrase}
    error = _refusal(response.status_code, status)
    after = response.headers.get("Retry-After", "")
    if after.isdigit() and "retryAfterSeconds" not in error.details:
        error.details = {**error.details, "retryAfterSeconds": int(after)}
    return error


def _refusal(code: int, status: Object) -> ApiError:
    return ApiError(code, status.get("reason") or "Unknown", status.get("message") or "", status.get("details"))


async def _bytes(response: httpx.Response) -> AsyncIterator[bytes]:
    with _network_errors():
        async for piece in response.aiter_bytes():
            yield piece


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Cut at newlines alone: httpx' own line reader also cuts at characters that JSON leaves as they are, such as U+0085."""
    pending = bytearray()
    async for piece in response.aiter_bytes():
        pending += piece
        if b"\n" not in piece:
            continue
        *whole, rest = bytes(pending).split(b"\n")
        pending = bytearray(rest)
        for line in whole:
            if line:
                yield line
        await asyncio.sleep(0)  # a long list of changes must not keep the loop from others


async def _changes(response: httpx.Response) -> AsyncIterator[tuple[str, Object]]:
    async for line in _lines(response):
        event = orjson.loads(line)
        if event["type"] == "ERROR":
            raise _refusal(event["object"].get("code", 500), event["object"])
        yield event["type"], event["object"]


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
