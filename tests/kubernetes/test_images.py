"""The images are what a node should be given: small, without root, with nothing to go on with for whoever gets in; and they run.

What is in an image is read from its archive; what it does is seen on the cluster, on a read-only root as a user without a name elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from crucible.frames import Kind, LineDecoder
from tests.cluster import Cluster
from tests.support.capabilities import needs
from tests.support.images import Image, built_image
from tests.support.waits import wait_until

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
MANIFEST = Path(__file__).with_name("manifests") / "images.yaml"
NAMESPACE = "images-check"
MEGABYTE = 1_000_000
# What an image may weigh unpacked, in megabytes.
LIMITS = {"service": 200, "runner": 120, "gvisor-installer": 200, "postgres": 120, "rabbitmq": 180, "redis": 90}
# It writes to folders of a node that belong to root.
ROOTS = {"gvisor-installer"}
INSTALLERS = re.compile(r"(pip|apt|dpkg|rpm|apk|gem|npm|uv|conda|easy_install)[-\d.]*")
COMPILERS = re.compile(r"(\S+-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|ld|as|ar|make|rustc|go|perl)[-\d.]*")
USER_CHANGERS = {"su", "sudo", "newgrp", "passwd", "chsh", "chfn", "mount", "umount", "setpriv"}
UNCHECKED_HASH = 1


@dataclass(frozen=True)
class Contents:
    """What is in an archive, its layers laid over each other."""

    names: set[str]
    config: dict[str, object]
    files: dict[str, tarfile.TarInfo]
    bytecode: dict[str, bytes]
    runner: bytes | None


@cache
def contents(name: str) -> Contents:
    with tarfile.open(built_image(name).archive) as archive:

        def read(member: str) -> bytes:
            file = archive.extractfile(member)
            assert file is not None
            return file.read()

        def blob(digest: str) -> bytes:
            content = read("blobs/" + digest.replace(":", "/"))
            assert hashlib.sha256(content).hexdigest() == digest.partition(":")[2]
            return content

        descriptors = json.loads(read("index.json"))["manifests"]
        (digest,) = {entry["digest"] for entry in descriptors}
        names = {entry["annotations"]["io.containerd.image.name"] for entry in descriptors}
        manifest = json.loads(blob(digest))
        found = Contents(names, json.loads(blob(manifest["config"]["digest"]))["config"], {}, {}, None)
        runner = None
        for layer in manifest["layers"]:
            content = blob(layer["digest"])
            raw = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
                for member in tar:
                    path = "/" + member.name.removeprefix("./").lstrip("/")
                    assert "/.wh." not in path, f"{path} was taken away only on paper"
                    found.files[path] = member
                    if member.isfile() and path.endswith(".pyc"):
                        found.bytecode[path] = (tar.extractfile(member) or io.BytesIO()).read(8)
                    if member.isfile() and path == "/opt/crucible/run.py":
                        runner = (tar.extractfile(member) or io.BytesIO()).read()
    return Contents(found.names, found.config, found.files, found.bytecode, runner)


def programs(name: str) -> set[str]:
    return {Path(path).name for path in contents(name).files if Path(path).parent.name in {"bin", "sbin"}}


def test_every_image_of_the_repository_is_looked_at_here():
    assert set(LIMITS) == {path.parent.name for path in (ROOT / "services" / "images").glob("*/Dockerfile")}


@pytest.mark.parametrize("name", LIMITS)
def test_an_image_is_small(name: str):
    size = built_image(name).size / MEGABYTE
    print(
        f"{name}: {size:.1f} MB unpacked, {built_image(name).archive.stat().st_size / MEGABYTE:.1f} MB in its archive"
    )
    assert size < LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_an_archive_carries_the_image_s_name_and_its_reference_by_digest(name: str):
    assert contents(name).names == {f"crucible.local/{name}:dev", built_image(name).reference}


@pytest.mark.parametrize("name", sorted(set(LIMITS) - ROOTS))
def test_an_image_does_not_run_as_root(name: str):
    assert contents(name).config["User"] == "65532:65532"


@pytest.mark.parametrize("name", LIMITS)
def test_no_file_lends_rights_or_is_a_device_and_only_scratch_folders_are_open_to_all(name: str):
    files = contents(name).files
    assert not [path for path, file in files.items() if file.isdev()]
    assert not [path for path, file in files.items() if not file.issym() and file.mode & (stat.S_ISUID | stat.S_ISGID)]
    assert {path for path, file in files.items() if not file.issym() and file.mode & stat.S_IWOTH} <= {
        "/tmp",
        "/var/tmp",
        "/run/lock",
        "/var/lock",
    }


@pytest.mark.parametrize("name", ["service", "runner"])
def test_whoever_gets_in_finds_nothing_that_installs_compiles_or_changes_users(name: str):
    found = programs(name)
    assert {"sh", "python3"} <= found
    assert not {program for program in found if INSTALLERS.fullmatch(program) or COMPILERS.fullmatch(program)}
    assert not found & USER_CHANGERS
    assert not [
        path for path in contents(name).files if re.search(r"-packages/(pip|setuptools|ensurepip)(/|-|$)", path)
    ]


def test_the_runner_image_has_of_ours_the_runner_alone():
    files = contents("runner").files
    assert [path for path, file in files.items() if "crucible" in path and file.isfile()] == ["/opt/crucible/run.py"]
    assert contents("runner").runner == (ROOT / "services/crucible/runner/run.py").read_bytes()


@pytest.mark.parametrize("name", ["service", "runner"])
def test_every_module_is_compiled_and_is_not_compared_with_its_source(name: str):
    files, bytecode = contents(name).files, contents(name).bytecode
    sources = [Path(path) for path in files if path.endswith(".py") and "/lib/python3" in path and "/bin/" not in path]
    compiled = {path.partition(".cpython")[0] for path in bytecode}
    assert not [path for path in sources if f"{path.parent}/__pycache__/{path.stem}" not in compiled]
    assert {int.from_bytes(head[4:8], "little") for head in bytecode.values()} == {UNCHECKED_HASH}


# --- on the cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster on which each image has run once."""
    images = {name: built_image(name) for name in LIMITS if name not in ROOTS}
    for image in images.values():
        cluster.import_image(image.archive)
    cluster.kubectl("apply", "-f", "-", input=manifest(images))

    def all_ended() -> bool:
        pods = json.loads(cluster.kubectl("-n", NAMESPACE, "get", "pods", "-o", "json"))["items"]
        phases = {pod["metadata"]["name"]: pod["status"]["phase"] for pod in pods}
        return set(phases) == set(images) and set(phases.values()) <= {"Succeeded", "Failed"}

    wait_until(all_ended, timeout=90, poll=0.5, describe="every image to have run")
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def manifest(images: dict[str, Image]) -> str:
    text = MANIFEST.read_text()
    for name, image in images.items():
        text = text.replace(f"crucible.local/{name}:dev", image.reference)
    return text


def log(cluster: Cluster, name: str) -> str:
    return cluster.kubectl("-n", NAMESPACE, "logs", name)


@needs("cluster")
def test_the_runner_runs_code_under_gvisor_and_tells_how_it_ended(ended: Cluster):
    frames = list(LineDecoder().feed(log(ended, "runner").encode()))
    assert b"".join(frame.payload for frame in frames if frame.kind == Kind.STDOUT) == b"hello from 65532\n"
    assert json.loads(frames[-1].payload)["exit_code"] == 0


@needs("cluster")
def test_every_service_starts_from_the_one_image(ended: Cluster):
    assert log(ended, "service").split() == ["api", "storage", "worker", "dispatcher", "monitor", "cleanup"]


@needs("cluster")
@pytest.mark.parametrize(
    ("name", "said"), [("postgres", r"PostgreSQL 18\."), ("redis", r"PONG"), ("rabbitmq", r"\b4\.[3-9]")]
)
def test_a_server_runs_without_root_on_a_read_only_root(ended: Cluster, name: str, said: str):
    assert re.search(said, log(ended, name))
