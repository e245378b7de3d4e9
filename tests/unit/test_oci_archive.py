"""The archive that nodes import: found in what either builder leaves, named twice, always the same bytes."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from tests.support.scripts import load_script

pytestmark = pytest.mark.unit

oci = load_script("oci_archive")
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LAYER = b"a layer's tar"


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def image() -> tuple[bytes, list[bytes]]:
    config = b"{}"
    entry = {"mediaType": MANIFEST_TYPE, "config": {"digest": digest(config)}, "layers": [{"digest": digest(LAYER)}]}
    return json.dumps(entry).encode(), [config, LAYER]


def directory_layout(folder: Path) -> Path:
    """What `buildah push dir:` writes."""
    manifest, blobs = image()
    folder.mkdir()
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    (folder / "manifest.json").write_bytes(manifest)
    for content in blobs:
        (folder / digest(content).partition(":")[2]).write_bytes(content)
    return folder


def docker_layout(folder: Path, *, images: int = 1) -> Path:
    """What `docker save` writes: an index around an index, with an attestation beside the image."""
    manifest, blobs = image()
    attestation = {"digest": digest(b""), "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    descriptor = {"mediaType": MANIFEST_TYPE, "digest": digest(manifest), "size": len(manifest)}
    inner = json.dumps({"manifests": [descriptor] * images + [attestation]}).encode()
    outer = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest(inner), "size": len(inner)}
    store = folder / "blobs" / "sha256"
    store.mkdir(parents=True)
    for content in [manifest, inner, *blobs]:
        (store / digest(content).partition(":")[2]).write_bytes(content)
    (folder / "index.json").write_text(json.dumps({"manifests": [outer]}))
    return folder


def test_both_builders_give_the_same_archive_under_both_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    oci.main("runner", directory_layout(tmp_path / "dir"), tmp_path / "buildah.tar")
    oci.main("runner", docker_layout(tmp_path / "docker"), tmp_path / "docker.tar")
    reference = f"crucible.local/runner@{digest(image()[0])}"
    assert capsys.readouterr().out == f"runner {reference} {len(LAYER)} " * 2
    assert (tmp_path / "buildah.tar").read_bytes() == (tmp_path / "docker.tar").read_bytes()
    with tarfile.open(tmp_path / "docker.tar") as archive:
        index = json.load(archive.extractfile("index.json") or pytest.fail("no index"))
    names = [entry["annotations"]["io.containerd.image.name"] for entry in index["manifests"]]
    assert names == ["crucible.local/runner:dev", reference]


def test_two_images_are_refused(tmp_path: Path):
    with pytest.raises(oci.LayoutError, match="holds 2 images"):
        oci.main("runner", docker_layout(tmp_path / "docker", images=2), tmp_path / "x.tar")


def test_a_manifest_that_was_tampered_with_is_refused(tmp_path: Path):
    layout = docker_layout(tmp_path / "docker")
    manifest = layout / "blobs" / "sha256" / digest(image()[0]).partition(":")[2]
    manifest.write_bytes(manifest.read_bytes().replace(b"layers", b"layerz"))
    with pytest.raises(oci.LayoutError, match="not what its digest says"):
        oci.main("runner", layout, tmp_path / "x.tar")
