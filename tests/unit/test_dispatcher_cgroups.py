"""Control groups, version 2, over a folder that looks like the kernel's.

A stand-in: it shows that the right files are written and read, not that the kernel acts on them. Version 1 runs for real in
tests/integration where the tests are root; version 2 does where a subtree is delegated to them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crucible.dispatcher import cgroups
from crucible.dispatcher.cgroups import ControlGroupsUnavailableError, ControlGroupsV1, ControlGroupsV2

pytestmark = pytest.mark.unit


def imitate(folder: Path) -> None:
    """Give a folder the files that the kernel would."""
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - Path.mkdir is what the tests replace
    for name in (
        "cgroup.procs",
        "cgroup.subtree_control",
        "memory.max",
        "memory.swap.max",
        "pids.max",
        "cpu.max",
        "cgroup.kill",
    ):
        (folder / name).write_text("")
    (folder / "cgroup.controllers").write_text("cpu memory pids")
    (folder / "memory.events").write_text("low 0\nmax 5\noom 1\noom_kill 2\n")
    (folder / "memory.peak").write_text("1234567\n")
    (folder / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose whole hierarchy belongs to this process, as in a container. Folders made in it look like groups."""
    root = tmp_path / "cgroup"
    imitate(root)
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/\n")
    (proc / "self/mountinfo").write_text(f"30 29 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw\n")
    make = Path.mkdir

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)  # type: ignore[arg-type]
        if root in self.parents:
            imitate(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return proc


def content(path: Path) -> str:
    return path.read_text()


def test_limits_are_set_before_anything_joins(machine: Path, tmp_path: Path) -> None:
    groups = ControlGroupsV2(machine)
    group = groups.create("ev-1", memory_bytes=1 << 28, processes=66)

    folder = Path(group.join_files[0]).parent
    assert group.join_files == [str(folder / "cgroup.procs")]
    assert folder.name == "ev-1"
    assert folder.parent.name.startswith(f"crucible-{os.getpid()}-")
    assert content(folder / "memory.max") == str(1 << 28)
    assert content(folder / "memory.swap.max") == "0"
    assert content(folder / "pids.max") == "66"
    assert content(folder / "cpu.max") == ""
    assert content(tmp_path / "cgroup/cgroup.subtree_control") == "+memory +pids +cpu"
    assert content(folder.parent / "cgroup.subtree_control") == "+memory +pids +cpu"


@pytest.mark.parametrize(("millis", "written"), [(250, "25000 100000"), (1500, "150000 100000"), (1, "1000 100000")])
def test_the_cpu_limit_is_a_quota_of_the_period(machine: Path, millis: int, written: str) -> None:
    group = ControlGroupsV2(machine).create("ev-1", memory_bytes=1, processes=1)
    group.limit_cpu(millis)

    assert content(Path(group.join_files[0]).with_name("cpu.max")) == written


def test_usage_is_what_the_kernel_counted(machine: Path) -> None:
    group = ControlGroupsV2(machine).create("ev-1", memory_bytes=1, processes=1)

    usage = group.usage()
    assert (usage.oom_kills, usage.peak_memory_bytes, usage.cpu_seconds) == (2, 1234567, 2.5)


def test_what_an_older_kernel_does_not_count_is_not_guessed(machine: Path) -> None:
    group = ControlGroupsV2(machine).create("ev-1", memory_bytes=1, processes=1)
    folder = Path(group.join_files[0]).parent
    for name in ("memory.peak", "cpu.stat", "memory.events"):
        (folder / name).unlink()

    usage = group.usage()
    assert (usage.oom_kills, usage.peak_memory_bytes, usage.cpu_seconds) == (0, None, None)


def test_a_subtree_that_was_not_delegated_is_left_alone(machine: Path, tmp_path: Path) -> None:
    (machine / "self/cgroup").write_text("0::/user.slice/session-3.scope\n")
    imitate(tmp_path / "cgroup/user.slice/session-3.scope")

    with pytest.raises(
        ControlGroupsUnavailableError, match=r"not delegated .*systemd-run --user --scope -p Delegate=yes"
    ):
        ControlGroupsV2(machine)
    assert content(tmp_path / "cgroup/user.slice/session-3.scope/cgroup.subtree_control") == ""


def test_a_subtree_without_the_controllers_is_refused_by_name(machine: Path, tmp_path: Path) -> None:
    (tmp_path / "cgroup/cgroup.controllers").write_text("cpu pids hugetlb")

    with pytest.raises(ControlGroupsUnavailableError, match="lacks the controllers memory"):
        ControlGroupsV2(machine)


def test_a_machine_without_either_version_says_what_is_missing(machine: Path) -> None:
    (machine / "self/mountinfo").write_text("")

    with pytest.raises(ControlGroupsUnavailableError, match="no version 2 hierarchy is mounted"):
        ControlGroupsV2(machine)
    with pytest.raises(ControlGroupsUnavailableError, match="no writable version 1 hierarchy for memory and pids"):
        ControlGroupsV1(machine)


def test_only_groups_of_dead_instances_are_leftovers(tmp_path: Path) -> None:
    own, count = cgroups._instance_name().rsplit("-", 1)
    for name in (
        f"{own}-{count}",
        f"{own}-77",
        "crucible-1-1-0",
        "crucible-4000000-5-1",
        "crucible-aside",
        "system.slice",
    ):
        (tmp_path / name).mkdir()

    # One in another PID namespace: its number says nothing here, but it holds its group.
    elsewhere = tmp_path / "crucible-4000000-6-0"
    elsewhere.mkdir()
    held = cgroups._hold(elsewhere)

    # Process 1 lives, but did not start at tick 1: the number was used again.
    assert {path.name for path in cgroups._dead_instances(tmp_path)} == {"crucible-1-1-0", "crucible-4000000-5-1"}

    os.close(held)
    assert elsewhere in cgroups._dead_instances(tmp_path)


def test_the_own_group_is_found_below_a_partial_mount(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("4:memory:/docker/abc/inner\n3:cpu,cpuacct:/\n")
    (tmp_path / "self/mountinfo").write_text(
        "1 0 0:1 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "2 0 0:2 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    )

    assert cgroups._own_folder("memory", tmp_path) == Path("/sys/fs/cgroup/memory/inner")
    assert cgroups._own_folder("cpuacct", tmp_path) == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert cgroups._own_folder("pids", tmp_path) is None
