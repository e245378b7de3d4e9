"""Makes an OCI image layout into an archive that every node imports under the same names.

    oci_archive.py NAME LAYOUT ARCHIVE

LAYOUT is a folder as `buildah push dir:` or an unpacked `docker save` leaves it. ARCHIVE is written with the names
`crucible.local/NAME:dev` and `crucible.local/NAME@sha256:...`, which containerd takes over when it imports it: there need be no
registry for a Pod to name its image by digest. Printed are the name, the reference by digest, and the bytes unpacked.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

# containerd's annotation for the whole name of an image in an archive (its `images.AnnotationImageName`).
NAME_ANNOTATION = "io.containerd.image.name"
REPOSITORY = "crucible.local"
_CHUNK_BYTES = 1 << 20


class LayoutError(Exception):
    """The folder is not what it should be."""


def blob(layout: Path, digest: str) -> Path:
    """Return the file of a digest."""
    algorithm, _, value = digest.partition(":")
    return layout / "blobs" / algorithm / value


def adopt_directory(layout: Path) -> None:
    """Make of what `buildah push dir:` writes, which is the only way to keep its layers as they are, an OCI layout."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for path in layout.iterdir():
        if len(path.name) == hashlib.sha256().digest_size * 2:
            path.rename(blobs / path.name)
    manifest = (layout / "manifest.json").read_bytes()
    digest = hashlib.sha256(manifest).hexdigest()
    (blobs / digest).write_bytes(manifest)
    descriptor = {"mediaType": json.loads(manifest)["mediaType"], "digest": f"sha256:{digest}", "size": len(manifest)}
    (layout / "index.json").write_text(json.dumps({"manifests": [descriptor]}))


def image_descriptor(layout: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptor of the one image in a layout, through the index that Docker wraps it in.

    Raises:
        LayoutError: there is none, or more than one.
    """
    found = [
        entry for entry in index.get("manifests", []) if "attestation" not in json.dumps(entry.get("annotations", {}))
    ]
    if len(found) != 1:
        raise LayoutError(f"{layout} holds {len(found)} images; one was expected")
    (descriptor,) = found
    if descriptor["mediaType"].endswith(("index.v1+json", "manifest.list.v2+json")):
        return image_descriptor(layout, json.loads(blob(layout, descriptor["digest"]).read_bytes()))
    return {key: descriptor[key] for key in ("mediaType", "digest", "size")}


def unpacked_bytes(layer: Path) -> int:
    """Return the size of a layer's tar, compressed or not."""
    with layer.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
    if not compressed:
        return layer.stat().st_size
    with gzip.open(layer) as stream:
        return sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))


def write_archive(layout: Path, names: list[str], descriptor: dict[str, Any], archive: Path) -> int:
    """Write what the image needs, always in the same bytes, and return how large its layers are unpacked."""
    manifest = json.loads(blob(layout, descriptor["digest"]).read_bytes())
    layers = [blob(layout, layer["digest"]) for layer in manifest["layers"]]
    blobs = {blob(layout, descriptor["digest"]), blob(layout, manifest["config"]["digest"]), *layers}
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{**descriptor, "annotations": {NAME_ANNOTATION: name}} for name in names],
    }
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
    for name, content in files.items():
        (layout / name).write_bytes(content)
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in [*(layout / name for name in files), *sorted(blobs)]:
            tar.add(path, path.relative_to(layout).as_posix(), filter=_plain)
    return sum(unpacked_bytes(layer) for layer in layers)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def main(name: str, layout: Path, archive: Path) -> None:
    """Write the archive and print the beginning of the image's line."""
    if not (layout / "index.json").exists():
        adopt_directory(layout)
    descriptor = image_descriptor(layout, json.loads((layout / "index.json").read_bytes()))
    content = blob(layout, descriptor["digest"]).read_bytes()
    if "sha256:" + hashlib.sha256(content).hexdigest() != descriptor["digest"]:
        raise LayoutError(f"{layout}: the manifest is not what its digest says")
    reference = f"{REPOSITORY}/{name}@{descriptor['digest']}"
    size = write_archive(layout, [f"{REPOSITORY}/{name}:dev", reference], descriptor, archive)
    sys.stdout.write(f"{name} {reference} {size} ")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
