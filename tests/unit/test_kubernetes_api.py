"""The Kubernetes client by itself: how it finds the API server, what it makes of errors, and how it cuts streams. A scripted transport
stands in for the API server; `tests/kubernetes` has the real one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from crucible.kubernetes.api import (
    JOBS,
    NODES,
    PODS,
    ApiError,
    ApiUnreachableError,
    Endpoint,
    KubernetesApi,
    KubernetesConfigError,
    from_kubeconfig,
    in_cluster,
)
from crucible.kubernetes.reflector import Change, ChangeKind, Reflector
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = pytest.mark.unit

Answer = "httpx.Response | Exception"


def api_of(answer: Callable[[httpx.Request], httpx.Response]) -> KubernetesApi:
    api = KubernetesApi(Endpoint("http://kubernetes.test", tls=False))
    api._http = httpx.AsyncClient(base_url=api.server, transport=httpx.MockTransport(answer))
    return api


def status(code: int, reason: str, message: str, **details: Any) -> httpx.Response:
    return httpx.Response(
        code, json={"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}
    )


@pytest.mark.parametrize(
    ("resource", "namespace", "name", "path"),
    [
        (PODS, "here", "one", "/api/v1/namespaces/here/pods/one"),
        (PODS, None, None, "/api/v1/pods"),
        (JOBS, "here", None, "/apis/batch/v1/namespaces/here/jobs"),
        (NODES, "ignored", "n1", "/api/v1/nodes/n1"),
    ],
)
def test_a_resource_knows_its_path(resource: Any, namespace: str | None, name: str | None, path: str) -> None:
    assert resource.path(namespace, name) == path
    assert JOBS.api_version == "batch/v1"
    assert PODS.api_version == "v1"


@pytest.mark.parametrize(
    ("answer", "true"),
    [
        (status(404, "NotFound", 'pods "x" not found'), {"not_found"}),
        (status(409, "AlreadyExists", "is there"), {"already_exists"}),
        (status(409, "Conflict", "has changed"), {"conflict"}),
        (status(403, "Forbidden", "exceeded quota: evaluations, requested: pods=1"), {"quota_exceeded"}),
        (status(403, "Forbidden", "ValidatingAdmissionPolicy denied request"), set()),
        (status(410, "Expired", "too old resource version"), {"gone"}),
        (status(429, "TooManyRequests", "slow down", retryAfterSeconds=3), {"transient"}),
        (status(503, "ServiceUnavailable", "starting"), {"transient"}),
        (status(422, "Invalid", "spec.containers: Required value"), set()),
        (httpx.Response(502, text="<html>bad gateway</html>"), {"transient"}),
    ],
)
async def test_a_refusal_says_what_it_means(answer: httpx.Response, true: set[str]) -> None:
    kinds = ("not_found", "already_exists", "conflict", "quota_exceeded", "gone", "transient")
    async with api_of(lambda _: answer) as api:
        with pytest.raises(ApiError) as caught:
            await api.create(PODS, {}, "here")
    assert {kind for kind in kinds if getattr(caught.value, kind)} == true
    assert str(answer.status_code) in str(caught.value)


async def test_it_is_told_when_to_come_again() -> None:
    throttled = httpx.Response(429, text="too many requests", headers={"Retry-After": "7"})
    async with api_of(lambda _: throttled) as api:
        with pytest.raises(ApiError) as caught:
            await api.get(PODS, "x", "here")
    assert caught.value.retry_after == 7


async def test_no_answer_is_an_error_of_its_own_that_may_pass() -> None:
    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("", request=request)

    async with api_of(silent) as api:
        with pytest.raises(ApiUnreachableError, match="ReadTimeout") as caught:
            await api.get(PODS, "x", "here")
    assert caught.value.transient


async def test_a_list_follows_every_page_and_gives_the_version_to_watch_from() -> None:
    def pages(request: httpx.Request) -> httpx.Response:
        first = "continue" not in request.url.params
        assert request.url.params["labelSelector"] == "a=b"
        metadata = {"resourceVersion": "5", "continue": "more"} if first else {"resourceVersion": "5"}
        return httpx.Response(200, json={"metadata": metadata, "items": [{"page": 1 if first else 2}]})

    async with api_of(pages) as api:
        assert await api.list(PODS, "here", labels="a=b") == ([{"page": 1}, {"page": 2}], "5")


async def test_a_watch_is_cut_at_newlines_alone() -> None:
    # As Go writes JSON: U+0085 stands as it is, and a reader of "lines" in Python's sense would cut there.
    lines = [{"type": "ADDED", "object": {"text": "a\u0085b\u000bc"}}, {"type": "BOOKMARK", "object": {}}]
    body = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.params["allowWatchBookmarks"] == "true"
        return httpx.Response(200, content=pieces())

    async with api_of(answer) as api, api.watch(PODS, "here", resource_version="1") as changes:
        assert [change async for change in changes] == [(line["type"], line["object"]) for line in lines]


# -- where the API server is


def test_outside_of_a_pod_one_is_told_to_name_a_kubeconfig(tmp_path: Path) -> None:
    with pytest.raises(KubernetesConfigError, match="CRUCIBLE_KUBERNETES__KUBECONFIG"):
        in_cluster({}, tmp_path)


KUBECONFIG = """\
current-context: here
contexts: [{name: here, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1/"}}]
users: [{name: u, user: %s}]
"""


def test_a_kubeconfig_names_server_and_token(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(KUBECONFIG % "{token: secret}")
    endpoint = from_kubeconfig(tmp_path / "config")
    assert (endpoint.server, endpoint.token) == ("http://127.0.0.1:1", "secret")
    assert "secret" not in repr(endpoint)


@pytest.mark.parametrize(
    "text",
    ["", "{", "current-context: gone\ncontexts: []", KUBECONFIG % "{exec: {command: aws}}"],
    ids=["empty", "not YAML", "no such context", "a plug-in"],
)
def test_a_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(KubernetesConfigError, match="config: is not a kubeconfig"):
        from_kubeconfig(tmp_path / "config")


# -- following


class Script:
    """An API server that answers one list after the other, and one watch after the other."""

    def __init__(self, lists: list[tuple[list[dict[str, Any]], str]], watches: list[list[dict[str, Any]]]) -> None:
        self.lists, self.watches = iter(lists), iter(watches)
        self.watched_from: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if "watch" not in request.url.params:
            items, version = next(self.lists)
            return httpx.Response(200, json={"metadata": {"resourceVersion": version}, "items": items})
        self.watched_from.append(request.url.params["resourceVersion"])
        events = next(self.watches, None)
        if events is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, content=b"".join(json.dumps(event).encode() + b"\n" for event in events))


def thing(name: str, version: int, uid: str = "") -> dict[str, Any]:
    return {"metadata": {"namespace": "here", "name": name, "uid": uid or name, "resourceVersion": str(version)}}


def event(kind: str, what: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": what}


async def follow(script: Script, until: int) -> tuple[list[tuple[ChangeKind, str]], Reflector]:
    told: list[tuple[ChangeKind, str]] = []

    def note(change: Change) -> None:
        told.append((change.kind, change.object["metadata"]["name"]))

    async with api_of(script) as api:
        reflector = Reflector(api, PODS, "here")
        reflector.subscribe(note)
        reflector.start()
        await wait_until_async(lambda: len(script.watched_from) >= until, timeout=5, describe="the script to be played")
        await reflector.aclose()
    return told, reflector


async def test_a_reflector_tells_each_change_once_and_goes_on_from_the_last_bookmark() -> None:
    script = Script(
        [([thing("a", 1)], "1")],
        [
            [event("ADDED", thing("b", 2)), event("MODIFIED", thing("a", 3)), event("BOOKMARK", thing("", 9))],
            [event("DELETED", thing("b", 10))],
        ],
    )
    told, reflector = await follow(script, 3)
    assert told == [("added", "a"), ("added", "b"), ("modified", "a"), ("deleted", "b")]
    assert script.watched_from[:3] == ["1", "9", "10"]
    assert list(reflector.objects) == [("here", "a")]


async def test_after_history_was_lost_only_the_difference_is_told() -> None:
    script = Script(
        [
            ([thing("gone", 1), thing("same", 2), thing("new-uid", 3, uid="old")], "3"),
            ([thing("same", 2), thing("new-uid", 7, uid="new"), thing("fresh", 8)], "8"),
        ],
        [[event("ERROR", {"code": 410, "reason": "Expired", "message": "too old"})]],
    )
    told, _ = await follow(script, 2)
    assert told[3:] == [("deleted", "gone"), ("deleted", "new-uid"), ("added", "new-uid"), ("added", "fresh")]
    assert script.watched_from[:2] == ["3", "8"]
