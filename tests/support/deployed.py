"""A platform that runs on a cluster, as its users and its operators see it."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from crucible.evaluation import TERMINAL_STATES
from crucible.names import PLATFORM_NAMESPACE
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.cluster import Cluster
    from tests.deployment import Image

WORKER = "deployment/crucible-worker"
_ROLLOUT_SECONDS = 120
_NAMESPACE = f"--namespace={PLATFORM_NAMESPACE}"


class DeployedPlatform:
    """Its API, with an administrator's key, and kubectl on its namespace."""

    def __init__(self, cluster: Cluster, url: str, api_key: str, images: Sequence[Image]) -> None:
        self.cluster = cluster
        self.images = images
        self.url = url
        self.api_key = api_key
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=30, trust_env=False
        )

    # -- as its users see it

    def submit(self, code: str, *, key: str | None = None, **fields: Any) -> str:
        """Submit code and return its evaluation's id. With a key, a submission whose answer was lost is made once only."""
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.http.post("/v1/evaluations", json={"code": code, **fields}, headers=headers)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def get(self, evaluation: str) -> dict[str, Any]:
        """Read an evaluation."""
        answer = self.http.get(f"/v1/evaluations/{evaluation}")
        answer.raise_for_status()
        return dict(answer.json())

    def output(self, evaluation: str, stream: str = "stdout") -> str:
        """Read what an evaluation has written so far."""
        answer = self.http.get(f"/v1/evaluations/{evaluation}/output/{stream}")
        answer.raise_for_status()
        return answer.text

    def events(self, evaluation: str) -> list[dict[str, Any]]:
        """Read everything that happened to an evaluation."""
        answer = self.http.get(f"/v1/evaluations/{evaluation}/events")
        answer.raise_for_status()
        return list(answer.json()["events"])

    def ended(self, evaluation: str, *, timeout: float) -> dict[str, Any]:
        """Wait until an evaluation has ended, and return it."""
        return self.all_ended([evaluation], timeout=timeout)[0]

    def all_ended(self, evaluations: Sequence[str], *, timeout: float) -> list[dict[str, Any]]:
        """Wait until evaluations have ended, and return them in the same order."""
        found: dict[str, dict[str, Any]] = {}

        def over() -> bool:
            for one in evaluations:
                if found.get(one, {}).get("state") not in TERMINAL_STATES:
                    found[one] = self.get(one)
            return all(record["state"] in TERMINAL_STATES for record in found.values())

        try:
            wait_until(over, timeout=timeout, poll=0.5, describe="evaluations to end", tolerate=(httpx.HTTPError,))
        except AssertionError as error:
            left = {
                one: record.get("state") for one, record in found.items() if record.get("state") not in TERMINAL_STATES
            }
            raise AssertionError(f"{error}; not ended: {left}") from None
        return [found[one] for one in evaluations]

    # -- as its operators see it

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl on the platform's namespace."""
        return self.cluster.kubectl(_NAMESPACE, *arguments)

    @contextmanager
    def slots(self, count: int) -> Iterator[None]:
        """Give the workers so many slots together for as long as the block lasts."""
        workers = int(self.kubectl("get", WORKER, "-o", "jsonpath={.spec.replicas}"))

        def set_to(value: str) -> None:
            self.kubectl("set", "env", WORKER, f"CRUCIBLE_WORKER__SLOTS{value}")
            self.rolled_out(WORKER, timeout=_ROLLOUT_SECONDS)

        set_to(f"={math.ceil(count / workers)}")
        try:
            yield
        finally:
            set_to("-")

    def objects(self, kind: str) -> list[dict[str, Any]]:
        """Return the platform's objects of a kind."""
        found = self.kubectl("get", kind, "--selector=app.kubernetes.io/part-of=crucible", "--output=json")
        return list(json.loads(found)["items"])

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Return the Pods of a component that are not about to go."""
        return [
            pod
            for pod in self.objects("pods")
            if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def rolled_out(self, *workloads: str, timeout: float) -> None:
        """Wait until workloads are as they should be."""
        for workload in workloads:
            self.kubectl("rollout", "status", workload, f"--timeout={timeout:.0f}s")
