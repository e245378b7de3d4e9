"""RabbitMQ's management API, as far as verifying and applying the topology needs it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import httpx

from crucible.broker.errors import BrokerError, BrokerReason

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from crucible.settings import BrokerSettings

_EXAMPLE = "CRUCIBLE_BROKER__MANAGEMENT_URL=http://USER:PASSWORD@HOST:15672"
# A node that computes statistics over many queues takes its time.
_ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class Request:
    """One change that the management API can make."""

    method: Literal["PUT", "POST"]
    path: tuple[str, ...]
    body: dict[str, Any]


class Management:
    """A client of the management API of one node, which answers for the whole cluster."""

    def __init__(self, settings: BrokerSettings) -> None:
        """Read where the API is; connects with the first call.

        Raises:
            BrokerError: the setting is missing or is no such URL.
        """
        url = httpx.URL(settings.management_url.get_secret_value() if settings.management_url else "")
        if url.scheme not in {"http", "https"} or not url.host:
            state = "is not an http(s) URL" if settings.management_url else "is not set"
            raise BrokerError(BrokerReason.URL, f"the management API's URL {state}", f"set {_EXAMPLE}")
        if not url.username:
            raise BrokerError(BrokerReason.URL, "the management API's URL names no user", f"write {_EXAMPLE}")
        self.address = f"{url.scheme}://{url.host}:{url.port or (443 if url.scheme == 'https' else 80)}"
        self.user = url.username
        self._client = httpx.Client(
            base_url=url.copy_with(username=None, password=None),
            auth=httpx.BasicAuth(url.username, url.password or ""),
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=settings.connect_timeout_seconds),
            verify=_trust(settings) if url.scheme == "https" else False,
            # The broker is never behind the proxy that the environment names for the internet.
            trust_env=False,
        )

    def get(self, *path: str) -> Any:
        """Return what the API says at a path, whose parts are names.

        Raises:
            BrokerError: it does not answer, or refuses.
        """
        return self._call("GET", path).json()

    def find(self, *path: str) -> Any:
        """Return the same, or None where there is no such thing."""
        answer = self._call("GET", path, accept={HTTPStatus.NOT_FOUND})
        return None if answer.status_code == HTTPStatus.NOT_FOUND else answer.json()

    def check(self, name: str) -> Any:
        """Return what a health check says, whether it passes or fails.

        It asks the nodes now, where `get("nodes")` answers from statistics that may be some seconds old.

        Raises:
            BrokerError: it does not answer, or refuses.
        """
        return self._call("GET", ("health", "checks", name), accept={HTTPStatus.SERVICE_UNAVAILABLE}).json()

    def send(self, request: Request) -> None:
        """Make a change.

        Raises:
            BrokerError: the broker does not answer, or refuses.
        """
        self._call(request.method, request.path, request.body)

    def _call(
        self,
        method: str,
        path: tuple[str, ...],
        body: dict[str, Any] | None = None,
        *,
        accept: set[HTTPStatus] | None = None,
    ) -> httpx.Response:
        place = "/api/" + "/".join(quote(part, safe="") for part in path)
        try:
            answer = self._client.request(method, place, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.is_success or answer.status_code in (accept or ()):
            return answer
        raise self._refusal(answer, f"{method} {place}")

    def _unreachable(self, error: httpx.HTTPError) -> BrokerError:
        if isinstance(error.__cause__ and error.__cause__.__cause__, ssl.SSLError) or "SSL" in str(error):
            return BrokerError(
                BrokerReason.TLS,
                f"TLS to the management API at {self.address} fails ({error})",
                "write the scheme that the port speaks (http:// or https://), and name the signer's certificates in "
                "CRUCIBLE_BROKER__CA_FILE",
            )
        return BrokerError(
            BrokerReason.UNREACHABLE,
            f"the management API at {self.address} cannot be reached ({str(error) or type(error).__name__})",
            "check the host and port in CRUCIBLE_BROKER__MANAGEMENT_URL, and that the plugin is on: "
            "`rabbitmq-plugins enable rabbitmq_management`",
        )

    def _refusal(self, answer: httpx.Response, call: str) -> BrokerError:
        try:
            said = str(answer.json().get("reason", ""))
        except (ValueError, AttributeError):
            said = answer.reason_phrase
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            return BrokerError(
                BrokerReason.CREDENTIALS,
                f"the management API refuses user {self.user!r} ({said})",
                "correct CRUCIBLE_BROKER__MANAGEMENT_URL; the user needs the tag administrator",
            )
        if answer.status_code == HTTPStatus.FORBIDDEN:
            return BrokerError(
                BrokerReason.REFUSED,
                f"the management API refuses {call} to user {self.user!r} ({said})",
                "use a user with the tag administrator (to verify only: monitoring is not enough either, it may not see users)",
            )
        if "inequivalent arg" in said:
            return BrokerError(BrokerReason.QUEUE_DIFFERS, said, "`crucible broker verify` names every difference")
        return BrokerError(
            BrokerReason.REFUSED,
            f"the management API refuses {call} ({answer.status_code}: {said})",
            "the broker's log says more",
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _trust(settings: BrokerSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.ca_file)
    if settings.cert_file:
        context.load_cert_chain(settings.cert_file, settings.key_file)
    return context
