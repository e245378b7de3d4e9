"""What the gVisor installer decides: whether containerd would read its drop-in, what it installs, and what it tells the cluster."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from crucible import names
from crucible.nodes import configuration, containerd, host, probe, readiness, release
from crucible.nodes.api import ApiError
from crucible.nodes.installer import Identity, Installer
from crucible.nodes.metrics import Metrics
from crucible.nodes.problems import InconclusiveError, NotReadyError, Reason
from crucible.nodes.readiness import Verdict

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "gitops" / "base" / "gvisor"
VERSION = tomllib.loads((MANIFESTS / configuration.INSTALLER).read_text("utf-8"))["version"]
NOW = "2026-01-01T00:00:00Z"
CONTAINERD_CONFIG = """
version = 3
imports = ["/etc/containerd/conf.d/*.toml"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  SystemdCgroup = true
"""


def reason_of(error: pytest.ExceptionInfo[NotReadyError]) -> Reason:
    return error.value.reason


class TestContainerdConfig:
    @pytest.mark.parametrize("version", ["containerd://2.0.0", "containerd://v2.2.1-rc.1", "containerd://12.1"])
    def test_merges_drop_ins_from_two_on(self, version: str) -> None:
        containerd.check_version(version)

    @pytest.mark.parametrize("version", ["containerd://1.7.27", "docker://27.0", "cri-o://1.33.0", ""])
    def test_is_refused_where_drop_ins_are_not_merged(self, version: str) -> None:
        with pytest.raises(NotReadyError) as error:
            containerd.check_version(version)
        assert reason_of(error) is Reason.CONTAINERD_TOO_OLD

    @pytest.mark.parametrize(
        "pattern", ["/etc/containerd/conf.d/*.toml", "conf.d/*.toml", "/etc/containerd/*/50-*.toml"]
    )
    def test_reads_the_drop_in_that_it_imports(self, pattern: str) -> None:
        containerd.check_imports(
            {"version": 3, "imports": [pattern]},
            config_path=host.CONTAINERD_CONFIG,
            drop_in_path=f"{host.DROP_INS}/50-x.toml",
        )

    @pytest.mark.parametrize("imports", [[], ["/etc/containerd/config.d/*.toml"], ["/etc/containerd/*.toml"]])
    def test_that_does_not_import_the_drop_in_is_refused_with_what_to_seed(self, imports: list[str]) -> None:
        with pytest.raises(NotReadyError, match=r'seed imports = \["/etc/containerd/conf.d/\*.toml"\]') as error:
            containerd.check_imports(
                {"version": 3, "imports": imports},
                config_path=host.CONTAINERD_CONFIG,
                drop_in_path=f"{host.DROP_INS}/50-x.toml",
            )
        assert reason_of(error) is Reason.DROP_IN_NOT_IMPORTED

    def test_of_an_older_version_is_refused_since_a_newer_drop_in_stops_its_migration(self) -> None:
        with pytest.raises(NotReadyError) as error:
            containerd.check_imports(
                {"version": 2, "imports": ["conf.d/*"]},
                config_path=host.CONTAINERD_CONFIG,
                drop_in_path=f"{host.DROP_INS}/50-x.toml",
            )
        assert reason_of(error) is Reason.CONTAINERD_CONFIG_VERSION

    def test_that_is_no_toml_is_refused(self) -> None:
        with pytest.raises(NotReadyError) as error:
            containerd.parse("version = ")
        assert reason_of(error) is Reason.CONTAINERD_CONFIG_UNREADABLE

    def test_tells_whether_cgroups_are_systemd_s(self) -> None:
        assert containerd.uses_systemd_cgroups(containerd.parse(CONTAINERD_CONFIG))
        assert not containerd.uses_systemd_cgroups({"version": 3, "plugins": {}})


class TestTemplates:
    def test_the_drop_in_adds_one_runtime_with_absolute_paths(self) -> None:
        folder = f"{host.RELEASES}/r-1"
        text = containerd.render((MANIFESTS / configuration.DROP_IN).read_text("utf-8"), folder=folder)
        containerd.check_drop_in(text, folder=folder)
        runtime = tomllib.loads(text)["plugins"][containerd.PLUGIN]["containerd"]["runtimes"][names.RUNTIME_HANDLER]
        assert runtime["runtime_path"] == f"{folder}/{release.SHIM}"
        assert runtime["options"] == {
            "TypeUrl": "io.containerd.runsc.v1.options",
            "ConfigPath": f"{folder}/{release.RUNSC_CONFIG}",
        }

    @pytest.mark.parametrize(
        "change",
        [
            ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"),
            ("version = 3", "version = 2"),
            ("$folder/runsc.toml", "/etc/runsc.toml"),
            ("runtimes.runsc", "runtimes.runc"),
            ("version = 3", 'version = 3\nroot = "/elsewhere"'),
        ],
    )
    def test_a_drop_in_that_does_anything_else_is_refused(self, change: tuple[str, str]) -> None:
        template = (MANIFESTS / configuration.DROP_IN).read_text("utf-8").replace(*change)
        with pytest.raises(NotReadyError) as error:
            containerd.check_drop_in(containerd.render(template, folder="/f"), folder="/f")
        assert reason_of(error) is Reason.CONFIGURATION_INVALID

    @pytest.mark.parametrize("template", ["a = $unknown", "a = $", "a = "])
    def test_a_wrong_template_is_refused(self, template: str) -> None:
        with pytest.raises(NotReadyError) as error:
            containerd.render(template, folder="/f")
        assert reason_of(error) is Reason.CONFIGURATION_INVALID

    def test_runsc_is_told_its_binary_and_the_node_s_cgroups(self) -> None:
        text = containerd.render(
            (MANIFESTS / configuration.RUNSC).read_text("utf-8"), folder="/f", systemd_cgroup="true"
        )
        table = tomllib.loads(text)
        assert table["binary_name"] == "/f/runsc"
        assert all(isinstance(value, str) for value in table["runsc_config"].values()), "the shim reads flags as text"
        assert table["runsc_config"]["systemd-cgroup"] == "true"


class TestManifests:
    @pytest.mark.parametrize(
        ("file", "wanted"),
        [
            ("daemonset.yaml", f'{names.LABEL_SANDBOX_NODE}: "true"'),
            ("daemonset.yaml", f"- key: {names.TAINT_NOT_READY}"),
            ("daemonset.yaml", f"- key: {names.TAINT_SANDBOX}"),
            ("daemonset.yaml", f"path: {host.RELEASES}"),
            ("daemonset.yaml", f"path: {host.DROP_INS}"),
            ("kustomization.yaml", f"namespace: {names.NODE_NAMESPACE}"),
            ("own-node.yaml", f"c.type != '{names.CONDITION_GVISOR}'"),
            ("own-node.yaml", f"k == '{names.LABEL_GVISOR}'"),
            ("own-node.yaml", f"t.key != '{names.TAINT_NOT_READY}'"),
            ("probe.yaml", f"name: {probe.TEMPLATE}"),
            ("runtime-class.yaml", f"handler: {names.RUNTIME_HANDLER}"),
        ],
    )
    def test_call_things_by_the_names_that_the_code_uses(self, file: str, wanted: str) -> None:
        assert wanted in (MANIFESTS / file).read_text("utf-8")


class TestNodeConfig:
    """What a node on Amazon Linux 2023 is told at its first boot."""

    @pytest.fixture
    def spec(self) -> Any:
        found = yaml.safe_load((ROOT / "platform" / "node_config" / "sandbox.yaml").read_text("utf-8"))
        assert (found["apiVersion"], found["kind"]) == ("node.eks.aws/v1alpha1", "NodeConfig")
        assert set(found) == {"apiVersion", "kind", "spec"}
        assert set(found["spec"]) <= {"cluster", "containerd", "instance", "kubelet", "featureGates"}
        return found["spec"]

    def test_seeds_the_import_without_which_the_installer_refuses(self, spec: Any) -> None:
        containerd.check_imports(
            containerd.parse(spec["containerd"]["config"]),
            config_path=host.CONTAINERD_CONFIG,
            drop_in_path=f"{host.DROP_INS}/{configuration.DROP_IN}",
        )

    def test_registers_with_the_label_and_taints_that_the_installer_looks_for(self, spec: Any) -> None:
        taints = [taint["key"] for taint in spec["kubelet"]["config"]["registerWithTaints"]]
        assert taints == [names.TAINT_SANDBOX, names.TAINT_NOT_READY]
        assert spec["kubelet"]["flags"] == [f"--node-labels={names.LABEL_SANDBOX_NODE}=true"]


class TestConfiguration:
    def test_of_the_repository_is_valid(self) -> None:
        assert configuration.read(MANIFESTS).version == VERSION

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "version = 3",
            'version = "a/../b"',
            'version = "v"\nverify_seconds = 0',
            'version = "v"\nprobe_second = 3',
            'version = "v"\nrestart = "systemctl restart containerd"',
            'version = "v"\n[sha256]\nrunsc = "abc"',
        ],
    )
    def test_that_is_wrong_is_refused_rather_than_half_obeyed(self, text: str) -> None:
        with pytest.raises(NotReadyError) as error:
            configuration.parse(text, drop_in="", runsc="")
        assert reason_of(error) is Reason.CONFIGURATION_INVALID


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What the image carries, with small files for the binaries."""
    folder = tmp_path / "image"
    folder.mkdir()
    for name in release.BINARIES:
        (folder / name).write_bytes(name.encode())
    sums = [f"{release.sha256(folder / name)}  {name}\n" for name in release.BINARIES]
    (folder / release.CHECKSUMS).write_text("".join(sums))
    (folder / release.VERSION).write_text(f"{VERSION}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "releases"
    folder.mkdir()
    return folder


def made(image: Path, config: str = "a = 1") -> release.Release:
    carried = release.carried(image, version=VERSION, pinned={})
    return release.Release(carried, release.folder_name(carried, config), config)


class TestRelease:
    def test_a_binary_that_is_not_what_the_build_wrote_down_is_refused(self, image: Path) -> None:
        (image / release.RUNSC).write_bytes(b"corrupted")
        with pytest.raises(NotReadyError, match="the image's build says") as error:
            release.carried(image, version=VERSION, pinned={})
        assert reason_of(error) is Reason.CHECKSUM_MISMATCH

    def test_a_binary_that_is_not_what_the_config_map_demands_is_refused(self, image: Path) -> None:
        with pytest.raises(NotReadyError, match="the ConfigMap says") as error:
            release.carried(image, version=VERSION, pinned={release.SHIM: "0" * 64})
        assert reason_of(error) is Reason.CHECKSUM_MISMATCH

    def test_another_version_than_the_one_asked_for_is_refused(self, image: Path) -> None:
        with pytest.raises(NotReadyError) as error:
            release.carried(image, version="release-20990101.0", pinned={})
        assert reason_of(error) is Reason.VERSION_MISMATCH

    def test_is_installed_whole_and_found_again(self, image: Path, root: Path) -> None:
        wanted = made(image)
        assert release.state(root, wanted) == "absent"
        release.install(root, wanted)
        assert release.state(root, wanted) == "whole"
        assert [path.name for path in root.iterdir()] == [wanted.name]
        assert os.access(root / wanted.name / release.RUNSC, os.X_OK)

    def test_what_an_interrupted_try_left_is_no_hindrance(self, image: Path, root: Path) -> None:
        wanted = made(image)
        (root / f".{wanted.name}.partial").mkdir()
        release.install(root, wanted)
        assert release.state(root, wanted) == "whole"

    @pytest.mark.parametrize("name", [*release.BINARIES, release.RUNSC_CONFIG])
    def test_a_file_that_someone_changed_is_told_and_not_repaired(self, image: Path, root: Path, name: str) -> None:
        wanted = made(image)
        release.install(root, wanted)
        (root / wanted.name / name).write_bytes(b"something else")
        with pytest.raises(NotReadyError, match=name) as error:
            release.state(root, wanted)
        assert reason_of(error) is Reason.INSTALLED_FILE_CHANGED

    def test_another_configuration_is_another_folder(self, image: Path) -> None:
        assert made(image, "a = 1").name != made(image, "a = 2").name

    def test_an_old_one_goes_when_nothing_executes_it(self, image: Path, root: Path, tmp_path: Path) -> None:
        used, unused, current = (made(image, f"a = {number}") for number in range(3))
        for each in (used, unused, current):
            release.install(root, each)
        (root / "not-ours").mkdir()
        processes = tmp_path / "proc"
        (processes / "17").mkdir(parents=True)
        (processes / "17" / "exe").symlink_to(root / used.name / release.SHIM)
        (processes / "2").mkdir()  # A thread of the kernel executes nothing.
        (processes / "self").mkdir()
        assert release.remove_unused(root, keep=current.name, processes=processes) == [unused.name]
        assert {path.name for path in root.iterdir()} == {used.name, current.name, "not-ours"}


def node(**changes: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "n", "resourceVersion": "7", "labels": changes.get("labels", {})},
        "spec": {"taints": changes.get("taints", [readiness.TAINT, {"key": "other", "effect": "NoExecute"}])},
        "status": {
            "conditions": changes.get("conditions", []),
            "nodeInfo": {"containerRuntimeVersion": "containerd://2.2.0", "kernelVersion": "6.12.0"},
            "runtimeHandlers": [{"name": name} for name in changes.get("handlers", ("", "runc"))],
        },
    }


class TestReadiness:
    def test_a_ready_node_gets_the_label_and_loses_our_taint_alone(self) -> None:
        patch = readiness.marks_patch(node(), ready=True)
        assert patch == {
            "metadata": {"resourceVersion": "7", "labels": {names.LABEL_GVISOR: names.GVISOR_READY}},
            "spec": {"taints": [{"key": "other", "effect": "NoExecute"}]},
        }

    def test_a_broken_node_gets_the_taint_back_and_loses_the_label(self) -> None:
        patch = readiness.marks_patch(node(labels={names.LABEL_GVISOR: names.GVISOR_READY}, taints=[]), ready=False)
        assert patch is not None
        assert patch["metadata"]["labels"] == {names.LABEL_GVISOR: None}
        assert patch["spec"]["taints"] == [readiness.TAINT]

    def test_what_is_said_already_is_not_said_again(self) -> None:
        assert (
            readiness.marks_patch(node(labels={names.LABEL_GVISOR: names.GVISOR_READY}, taints=[]), ready=True) is None
        )
        assert readiness.marks_patch(node(), ready=False) is None
        verdict = Verdict(ready=False, reason=Reason.PROBE_FAILED, message="m")
        patch = readiness.condition_patch(node(), verdict, now=NOW)
        assert patch is not None
        assert readiness.condition_patch(node(conditions=patch["status"]["conditions"]), verdict, now="later") is None

    def test_a_condition_keeps_its_time_while_only_its_reason_changes(self) -> None:
        before = readiness.condition_patch(node(), Verdict(ready=False, reason=Reason.INSTALLING, message="m"), now=NOW)
        assert before is not None
        after = readiness.condition_patch(
            node(conditions=before["status"]["conditions"]),
            Verdict(ready=False, reason=Reason.PROBE_FAILED, message="m"),
            now="later",
        )
        assert after is not None
        assert after["status"]["conditions"][0]["lastTransitionTime"] == NOW
        assert after["status"]["conditions"][0]["lastHeartbeatTime"] == "later"


def ended(
    *, phase: str = "Succeeded", log: str = "[   0.000000] Starting gVisor...", kernel: str = "4.4.0", **status: str
) -> Any:
    message = json.dumps({"kernel": kernel, "log": log})
    return {
        "status": {
            "phase": phase,
            "containerStatuses": [{"state": {"terminated": {"exitCode": 0, "message": message}}}],
            **status,
        }
    }


class TestProbe:
    def test_believes_a_kernel_that_calls_itself_gvisor(self) -> None:
        assert probe.judge(ended(), node_kernel="6.12.0") == "4.4.0"

    @pytest.mark.parametrize("seen", [{"log": ""}, {"log": "[0.0] Linux version"}, {"kernel": "6.12.0"}])
    def test_a_sandbox_on_the_node_s_own_kernel_is_not_gvisor(self, seen: dict[str, str]) -> None:
        with pytest.raises(NotReadyError) as error:
            probe.judge(ended(**seen), node_kernel="6.12.0")
        assert reason_of(error) is Reason.NOT_GVISOR

    def test_a_failed_pod_is_a_failed_probe_with_what_kubernetes_says(self) -> None:
        with pytest.raises(NotReadyError, match="DeadlineExceeded") as error:
            probe.judge(ended(phase="Failed", reason="DeadlineExceeded"), node_kernel="6.12.0")
        assert reason_of(error) is Reason.PROBE_FAILED

    @pytest.mark.parametrize("reason", ["OutOfcpu", "OutOfpods", "Evicted"])
    def test_a_full_node_says_nothing_about_gvisor(self, reason: str) -> None:
        with pytest.raises(InconclusiveError):
            probe.judge(ended(phase="Failed", reason=reason), node_kernel="6.12.0")

    def test_its_pod_is_bound_to_the_node_and_goes_with_the_installer(self) -> None:
        template = {"template": {"spec": {"runtimeClassName": "gvisor-probe", "containers": [{"image": "old"}]}}}
        owner = {"metadata": {"name": "installer-x", "uid": "u"}}
        pod = probe.pod(template, node="n", image="new@sha256:1", owner=owner)
        assert pod["spec"]["nodeName"] == "n"
        assert pod["spec"]["containers"][0]["image"] == "new@sha256:1"
        assert pod["metadata"]["ownerReferences"][0]["uid"] == "u"
        assert template["template"]["spec"]["containers"][0]["image"] == "old", "the template is left as it is"

    def test_says_what_keeps_the_pod(self) -> None:
        events = [{"type": "Warning", "message": 'no runtime for "runsc" is configured'}]
        assert probe.delay({"status": {"phase": "Pending"}}, events) == events[0]["message"]
        assert probe.delay({"status": {"phase": "Pending"}}, []) == "it is Pending"


class ApiInMemory:
    """A stand-in for the API server with one node, whose kubelet learns of gVisor when containerd is restarted."""

    def __init__(self) -> None:
        self.node = node()
        self.ended = ended()
        self.away = False
        self.probes = 0

    def get(self, path: str, **query: str) -> dict[str, Any]:
        if self.away:
            raise ApiError(0, "refused")
        if path.startswith("/api/v1/nodes/"):
            return self.node
        if "/podtemplates/" in path:
            return {"template": {"spec": {"containers": [{}]}}}
        spec = {"containers": [{"image": "i"}]}
        return {"metadata": {"name": "p", "uid": "u"}, "spec": spec, **(self.ended if "probe" in path else {})}

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.probes += 1
        return {"metadata": {"name": "probe-1", "uid": "u"}}

    def patch(self, path: str, body: dict[str, Any], kind: str) -> dict[str, Any]:
        if path.endswith("/status"):
            self.node["status"]["conditions"] = body["status"]["conditions"]
        else:
            self.node["metadata"]["labels"] = {k: v for k, v in body["metadata"]["labels"].items() if v}
            self.node["spec"]["taints"] = body["spec"]["taints"] or []
        return self.node

    def delete(self, path: str) -> None:
        pass


class Node:
    """An installer on a node that is a few folders."""

    def __init__(self, folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.api, self.metrics, self.now, self.restarts = ApiInMemory(), Metrics(), 0.0, 0
        self.image = image
        self.host = host.Host(folder / "releases", folder / "containerd", folder / "drop-ins", folder / "processes")
        for path in (self.host.releases, self.host.containerd, self.host.drop_ins, self.host.processes):
            path.mkdir(exist_ok=True)
        self.host.containerd_config.write_text(CONTAINERD_CONFIG)
        self.restart_learns = True
        monkeypatch.setattr(host.Host, "restart", lambda *_: self._restart())
        self.start()

    def start(self) -> None:
        """A new process of the installer."""
        identity = Identity(node="n", pod="installer")
        self.installer = Installer(
            self.api,
            identity,
            self.metrics,
            settings=MANIFESTS,
            carried=self.image,
            on=self.host,
            pause=self._pause,
            clock=lambda: self.now,
        )

    def _restart(self) -> None:
        self.restarts += 1
        if self.restart_learns:
            self.api.node["status"]["runtimeHandlers"].append({"name": names.RUNTIME_HANDLER})

    def _pause(self, seconds: float) -> None:
        self.now += seconds

    @property
    def told(self) -> tuple[str, str]:
        condition = readiness.condition(self.api.node) or {}
        return condition["status"], condition["reason"]

    @property
    def open(self) -> bool:
        return (
            self.api.node["metadata"]["labels"].get(names.LABEL_GVISOR) == names.GVISOR_READY
            and readiness.TAINT not in self.api.node["spec"]["taints"]
        )


@pytest.fixture
def machine(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, image, monkeypatch)


class TestInstaller:
    def test_opens_the_node_once_a_sandbox_has_run(self, machine: Node) -> None:
        machine.installer.round()
        assert machine.open
        assert machine.told == ("True", "SandboxRan")
        assert machine.metrics.get("gvisor_node_ready") == 1
        assert machine.restarts == 1

    def test_a_second_round_and_a_second_process_restart_nothing(self, machine: Node) -> None:
        machine.installer.round()
        machine.installer.round()
        assert (machine.restarts, machine.api.probes) == (1, 1)
        machine.start()
        machine.installer.round()
        assert (machine.restarts, machine.api.probes) == (1, 2)

    def test_a_restart_that_a_crash_prevented_is_made_up_for(
        self, machine: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(host.Host, "restart", crash)
            with pytest.raises(KeyboardInterrupt):
                machine.installer.round()
        assert not machine.open
        machine.start()
        machine.installer.round()
        assert machine.open
        assert machine.restarts == 1

    def test_a_corrupted_image_changes_nothing_on_the_node(self, machine: Node) -> None:
        (machine.image / release.RUNSC).write_bytes(b"corrupted")
        machine.installer.round()
        assert machine.told == ("False", "ChecksumMismatch")
        assert not machine.open
        assert list(machine.host.releases.iterdir()) == list(machine.host.drop_ins.iterdir()) == []
        assert machine.restarts == 0

    def test_a_file_changed_later_closes_the_node(self, machine: Node) -> None:
        machine.installer.round()
        [installed] = [path for path in machine.host.releases.iterdir() if path.is_dir()]
        (installed / release.RUNSC).write_bytes(b"changed")
        machine.installer.round()
        assert machine.told == ("False", "InstalledFileChanged")
        assert not machine.open
        assert machine.metrics.get("gvisor_node_ready") == 0
        assert machine.metrics.get("gvisor_install_failures_total", reason="InstalledFileChanged") == 1

    def test_a_sandbox_that_no_longer_is_gvisor_closes_the_node_when_its_time_comes(self, machine: Node) -> None:
        machine.installer.round()
        machine.api.ended = ended(log="")
        machine.installer.round()
        assert machine.open, "the last sandbox is recent"
        machine.now += configuration.Configuration.probe_seconds
        machine.installer.round()
        assert machine.told == ("False", "NotGvisor")
        assert not machine.open

    def test_what_tells_nothing_about_gvisor_changes_nothing(self, machine: Node) -> None:
        machine.installer.round()
        machine.api.away = True
        machine.installer.round()
        machine.api.away = False
        machine.now += configuration.Configuration.probe_seconds
        machine.api.ended = ended(phase="Failed", reason="OutOfpods")
        machine.installer.round()
        assert machine.open

    def test_a_runtime_that_the_kubelet_never_lists_is_told(self, machine: Node) -> None:
        machine.restart_learns = False
        machine.installer.round()
        assert machine.told == ("False", "RuntimeMissing")
        assert not machine.open
        assert machine.host.restart_owed.exists(), "the next try restarts again"

    def test_an_upgrade_stands_beside_the_old_version_until_that_is_unused(self, machine: Node) -> None:
        machine.installer.round()
        [old] = [path for path in machine.host.releases.iterdir() if path.is_dir()]
        process = machine.host.processes / "9"
        process.mkdir()
        (process / "exe").symlink_to(old / release.SHIM)
        (machine.image / release.SHIM).write_bytes(b"newer")
        sums = [f"{release.sha256(machine.image / name)}  {name}\n" for name in release.BINARIES]
        (machine.image / release.CHECKSUMS).write_text("".join(sums))
        machine.start()
        machine.installer.round()
        assert machine.open
        assert machine.restarts == 2
        assert old.exists()
        (process / "exe").unlink()
        machine.now += configuration.Configuration.probe_seconds
        machine.installer.round()
        assert not old.exists()

    def test_metrics_are_in_prometheus_format(self, machine: Node) -> None:
        machine.installer.round()
        text = machine.metrics.text()
        assert "\ngvisor_node_ready 1\n" in text
        assert f'gvisor_installer_info{{node="n",version="{VERSION}",release="{VERSION}-' in text
