"""What the runtimes decide without making a sandbox: which one, as whom, with which folders, and what a failure means."""

from __future__ import annotations

from pathlib import Path

import pytest

from crucible.dispatcher.dispatcher import make_runtime, node_resources
from crucible.dispatcher.runtimes import RuntimeUnavailableError
from crucible.dispatcher.runtimes.bubblewrap import explain, system_folders
from crucible.dispatcher.runtimes.local import HostIds
from crucible.limits import Limits
from crucible.settings import DispatcherSettings
from tests.support.capabilities import needs

pytestmark = [pytest.mark.unit, needs("linux")]

EVERYTHING = "0 0 4294967295\n"
ROOTLESS = "0 1000 1\n1 100000 65536\n"


@pytest.mark.parametrize(
    ("system", "setting", "name"),
    [("Linux", "auto", "bubblewrap"), ("Linux", "process", "process"), ("Darwin", "auto", "process")],
)
def test_the_runtime_follows_the_system_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, system: str, setting: str, name: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)

    assert make_runtime(DispatcherSettings(runtime=setting), Limits()).name == name  # type: ignore[arg-type]


def test_bubblewrap_elsewhere_than_on_linux_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")

    with pytest.raises(RuntimeUnavailableError, match="bubblewrap is for Linux"):
        make_runtime(DispatcherSettings(runtime="bubblewrap"), Limits())


def test_sandboxes_of_a_cluster_are_not_quietly_made_on_this_machine() -> None:
    with pytest.raises(RuntimeUnavailableError, match="not made by the platform on one machine"):
        make_runtime(DispatcherSettings(runtime="kubernetes"), Limits())


def test_the_node_has_what_the_settings_say() -> None:
    resources = node_resources(DispatcherSettings(cpu_millis=700, memory_bytes=64 * 1024**2))

    assert (resources.cpu_millis, resources.memory_bytes) == (700, 64 * 1024**2)


def test_root_gives_each_sandbox_a_user_of_its_own_and_uses_it_again_only_when_it_is_free() -> None:
    ids = HostIds(root=True, uid_map=EVERYTHING)
    first, second = ids.take(), ids.take()
    ids.give_back(first)

    assert first is not None
    assert first >= 1_879_048_192
    assert second == first + 1
    assert ids.take() == first
    assert ids.take() == first + 2


def test_others_than_root_stay_who_they_are_and_small_user_maps_mean_nobody() -> None:
    assert HostIds(root=False, uid_map=EVERYTHING).take() is None
    shared = HostIds(root=True, uid_map=ROOTLESS)
    assert (shared.take(), shared.take()) == (65534, 65534)
    shared.give_back(65534)
    assert shared.take() == 65534


def test_system_folders_are_mirrored_as_links_or_folders(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "bin").mkdir()

    arguments = system_folders(tmp_path)

    assert arguments[:3] == ["--ro-bind", "/usr", "/usr"]
    assert arguments[arguments.index("--symlink") :][:3] == ["--symlink", "usr/lib", "/lib"]
    assert "/bin" in arguments
    assert "/lib64" not in arguments


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("bwrap: Unknown option --disable-userns", "bubblewrap 0.8 or later"),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "hides parts of /proc"),
        ("bwrap: No permissions to create a new namespace", "user namespaces are forbidden"),
        ("bwrap: setting up uid map: Permission denied", "user namespaces are forbidden"),
        ("something else entirely", "CRUCIBLE_DISPATCHER__RUNTIME=process"),
    ],
)
def test_a_failure_is_explained_with_what_to_do(monkeypatch: pytest.MonkeyPatch, said: str, hint: str) -> None:
    monkeypatch.setattr("crucible.dispatcher.runtimes.bubblewrap._SYSCTLS", {})
    error = explain(said)

    assert said in error.reason
    assert hint in error.hint


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_forbidding_sysctl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    knob = tmp_path / "knob"
    knob.write_text(f"{value}\n")
    monkeypatch.setattr("crucible.dispatcher.runtimes.bubblewrap._SYSCTLS", {knob: ("0", "sysctl -w knob=1")})

    hint = explain("bwrap: setting up uid map: Permission denied").hint

    assert ("sysctl -w knob=1" in hint) == (value == "0")
