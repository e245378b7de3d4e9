"""One round after the other: see what is, make it what it should be, start a sandbox, and say so.

The order within a round is what makes it safe. A node that is about to be changed stops taking sandboxes first; containerd is
restarted only for a drop-in that it has not read; nothing is called ready before a sandbox has said that its kernel is gVisor.
Where nothing could be learnt (the API server away, the node full) what was true stays so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from crucible import names
from crucible.nodes import configuration, containerd, host, probe, readiness, release
from crucible.nodes.api import MERGE_PATCH, STRATEGIC_MERGE_PATCH, Api, ApiError
from crucible.nodes.configuration import Configuration
from crucible.nodes.metrics import Metrics
from crucible.nodes.problems import InconclusiveError, NotReadyError, Reason
from crucible.nodes.readiness import Verdict

Object = dict[str, Any]
logger = logging.getLogger("crucible.nodes")

_POLL_SECONDS = 0.5
_PATCH_TRIES = 5


@dataclass(frozen=True)
class Identity:
    """Who this installer is: its node, and the Pod that it runs in."""

    node: str
    pod: str
    namespace: str = names.NODE_NAMESPACE


@dataclass(frozen=True)
class Plan:
    """What this node should have."""

    release: release.Release
    drop_in: str


class Installer:
    """Keeps one node's gVisor as its ConfigMap says."""

    def __init__(
        self,
        api: Api,
        identity: Identity,
        metrics: Metrics,
        *,
        settings: Path,
        carried: Path,
        on: host.Host | None = None,
        pause: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._identity = identity
        self._metrics = metrics
        self._settings = settings
        self._carried = carried
        self._host = on or host.Host()
        self._pause = pause
        self._clock = clock
        self._proved_at: float | None = None
        self._proved = ""
        self._said = ""

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Do rounds until `stopped(seconds)`, which waits for that long, says so."""
        wait = 0.0
        while not stopped(wait):
            wait = self.round()

    def round(self) -> float:
        """See to the node once; return how many seconds to leave it alone."""
        wait = Configuration.retry_seconds
        try:
            config = configuration.read(self._settings)
            wait = config.retry_seconds
            self._report(self._ensure(config))
        except NotReadyError as error:
            self._proved_at = None
            self._metrics.count("gvisor_install_failures_total", reason=error.reason.value)
            self._say(logging.ERROR, f"{error.reason.value}: {error}")
            self._report_if_possible(Verdict(ready=False, reason=error.reason, message=str(error)))
        except InconclusiveError as error:
            self._say(logging.WARNING, f"left as it was: {error}")
        else:
            self._said = ""
            self._metrics.set("gvisor_verified_timestamp_seconds", round(time.time(), 3))
            return config.verify_seconds
        return wait

    def _say(self, level: int, message: str) -> None:
        """Log what a round came to, once for as long as it stays the same."""
        if message != self._said:
            logger.log(level, "%s", message)
        self._said = message

    def _ensure(self, config: Configuration) -> Verdict:
        node = self._node()
        plan = self._plan(config, node)
        name = plan.release.name
        self._metrics.only("gvisor_installer_info", node=self._identity.node, version=config.version, release=name)
        self._apply(config, plan)
        if not readiness.knows_runtime(self._node()):
            self._await_runtime(config)
        if self._proof_is_due(config, name):
            kernel = self._prove(config)
            self._proved_at, self._proved = self._clock(), f"{name}: a sandbox ran there on kernel {kernel}"
            for old in release.remove_unused(self._host.releases, keep=name, processes=self._host.processes):
                logger.info("removed %s, which nothing executes any more", old)
        return Verdict(ready=True, reason=Reason.SANDBOX_RAN, message=self._proved)

    def _plan(self, config: Configuration, node: Object) -> Plan:
        containerd.check_version(readiness.runtime_version(node))
        try:
            text = self._host.containerd_config.read_text("utf-8")
        except OSError as error:
            raise NotReadyError(Reason.CONTAINERD_CONFIG_UNREADABLE, f"{host.CONTAINERD_CONFIG}: {error}") from error
        own = containerd.parse(text)
        drop_in_path = f"{host.DROP_INS}/{configuration.DROP_IN}"
        containerd.check_imports(own, config_path=host.CONTAINERD_CONFIG, drop_in_path=drop_in_path)
        carried = release.carried(self._carried, version=config.version, pinned=config.sha256)
        systemd = "true" if containerd.uses_systemd_cgroups(own) else "false"
        # The files name their own folder, and the folder is named after the files: after what they say but for that name.
        anywhere = containerd.render(config.runsc, systemd_cgroup=systemd, folder=".")
        name = release.folder_name(carried, anywhere)
        folder = f"{host.RELEASES}/{name}"
        runsc = containerd.render(config.runsc, systemd_cgroup=systemd, folder=folder)
        drop_in = containerd.render(config.drop_in, folder=folder)
        containerd.check_drop_in(drop_in, folder=folder)
        return Plan(release.Release(carried, name, runsc), drop_in)

    def _apply(self, config: Configuration, plan: Plan) -> None:
        absent = release.state(self._host.releases, plan.release) == "absent"
        path = self._host.drop_ins / configuration.DROP_IN
        written = path.is_file() and path.read_bytes() == plan.drop_in.encode()
        if not absent and written and not self._host.restart_owed.exists():
            return
        name = plan.release.name
        self._proved_at = None
        self._report(Verdict(ready=False, reason=Reason.INSTALLING, message=f"{name} is being installed"))
        if absent:
            release.install(self._host.releases, plan.release)
            logger.info("installed %s", name)
        release.write_file(self._host.restart_owed, f"{name}\n")
        if not written:
            release.write_file(path, plan.drop_in)
        self._metrics.count("gvisor_containerd_restarts_total")
        self._host.restart(config.restart)
        logger.info("restarted containerd for %s", name)
        self._await_runtime(config)
        self._host.restart_owed.unlink()

    def _await_runtime(self, config: Configuration) -> None:
        deadline = self._clock() + config.restart_timeout_seconds
        while True:
            try:
                if readiness.knows_runtime(self._node()):
                    return
            except ApiError as error:
                logger.info("while waiting for the kubelet: %s", error)
            if self._clock() >= deadline:
                raise NotReadyError(
                    Reason.RUNTIME_MISSING,
                    f"{config.restart_timeout_seconds:.0f} s after containerd's restart the kubelet does not list the runtime "
                    f"{names.RUNTIME_HANDLER}: see containerd's log on the node",
                )
            self._pause(_POLL_SECONDS)

    def _proof_is_due(self, config: Configuration, name: str) -> bool:
        return (
            self._proved_at is None
            or not self._proved.startswith(f"{name}:")
            or self._clock() - self._proved_at >= config.probe_seconds
        )

    def _prove(self, config: Configuration) -> str:
        pods = f"/api/v1/namespaces/{self._identity.namespace}/pods"
        own = self._api.get(f"{pods}/{self._identity.pod}")
        template = self._api.get(f"/api/v1/namespaces/{self._identity.namespace}/podtemplates/{probe.TEMPLATE}")
        image = own["spec"]["containers"][0]["image"]
        made = self._api.create(pods, probe.pod(template, node=self._identity.node, image=image, owner=own))
        path = f"{pods}/{made['metadata']['name']}"
        try:
            kernel = probe.judge(self._end_of(path, config), node_kernel=readiness.kernel_version(self._node()))
        except NotReadyError:
            self._metrics.count("gvisor_probes_total", result="failed")
            raise
        except InconclusiveError:
            self._metrics.count("gvisor_probes_total", result="inconclusive")
            raise
        finally:
            self._delete(path)
        self._metrics.count("gvisor_probes_total", result="gvisor")
        return kernel

    def _end_of(self, path: str, config: Configuration) -> Object:
        deadline = self._clock() + config.probe_timeout_seconds
        while True:
            made = self._api.get(path)
            if probe.is_over(made):
                return made
            if self._clock() >= deadline:
                events = self._api.get(
                    f"/api/v1/namespaces/{self._identity.namespace}/events",
                    fieldSelector=f"involvedObject.uid={made['metadata']['uid']}",
                )
                why = probe.delay(made, events.get("items", []))
                waited = f"{config.probe_timeout_seconds:.0f} s"
                raise NotReadyError(Reason.PROBE_FAILED, f"the probe's Pod has not ended after {waited}: {why}")
            self._pause(_POLL_SECONDS)

    def _delete(self, path: str) -> None:
        try:
            self._api.delete(path)
        except ApiError as error:
            logger.warning("the probe's Pod stays until this installer's Pod goes: %s", error)

    def _node(self) -> Object:
        return self._api.get(self._node_path)

    @property
    def _node_path(self) -> str:
        return f"/api/v1/nodes/{self._identity.node}"

    def _report_if_possible(self, verdict: Verdict) -> None:
        try:
            self._report(verdict)
        except InconclusiveError as error:
            logger.warning("not told yet: %s", error)

    def _report(self, verdict: Verdict) -> None:
        """Make the node say the verdict. A node that is not ready is closed before it says why; one that is opens last."""
        if not verdict.ready:
            self._metrics.set("gvisor_node_ready", 0)
        steps = [self._state_condition, self._set_marks]
        for step in steps if verdict.ready else reversed(steps):
            step(verdict)
        if verdict.ready:
            self._metrics.set("gvisor_node_ready", 1)

    def _state_condition(self, verdict: Verdict) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        patch = readiness.condition_patch(self._node(), verdict, now=now)
        if patch:
            self._api.patch(f"{self._node_path}/status", patch, STRATEGIC_MERGE_PATCH)

    def _set_marks(self, verdict: Verdict) -> None:
        for _ in range(_PATCH_TRIES):
            patch = readiness.marks_patch(self._node(), ready=verdict.ready)
            if patch is None:
                return
            try:
                self._api.patch(self._node_path, patch, MERGE_PATCH)
            except ApiError as error:
                if error.status != HTTPStatus.CONFLICT:
                    raise
            else:
                logger.info("the node is %s", "open for sandboxes" if verdict.ready else "closed for sandboxes")
                return
        raise ApiError(HTTPStatus.CONFLICT, f"{self._identity.node} changes faster than it can be marked")
