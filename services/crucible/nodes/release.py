"""One set of gVisor's files on the node: carried by the image, installed under a name that its contents decide, never changed.

A folder is named after gVisor's version and the digest of all that is in it, and appears whole by a rename. So an upgrade is
another folder beside the old one, running sandboxes keep theirs, and a file that differs from its folder's name was changed by
someone: that is told, and not repaired.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crucible.nodes.problems import NotReadyError, Reason

RUNSC = "runsc"
SHIM = "containerd-shim-runsc-v1"
BINARIES = (RUNSC, SHIM)
RUNSC_CONFIG = "runsc.toml"
CHECKSUMS = "SHA256SUMS"
VERSION = "VERSION"
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}")
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(\S+)")


@dataclass(frozen=True)
class Carried:
    """The binaries in the image, each found to be what the image was built with."""

    folder: Path
    version: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Release:
    """What a folder on the node must hold."""

    carried: Carried
    name: str
    runsc_config: str

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file by name."""
        return {**self.carried.digests, RUNSC_CONFIG: hashlib.sha256(self.runsc_config.encode()).hexdigest()}


def folder_name(carried: Carried, runsc_config: str) -> str:
    """Return the version and a digest of every file, so that another content is another folder."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(carried.digests.items())]
    return f"{carried.version}-{hashlib.sha256(''.join([*lines, runsc_config]).encode()).hexdigest()[:12]}"


def sha256(path: Path) -> str:
    """Return the digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_checksums(text: str) -> dict[str, str]:
    """Return the digests in the format of `sha256sum`, by file name."""
    found = [_CHECKSUM_LINE.fullmatch(line) for line in text.splitlines()]
    return {match[2]: match[1] for match in found if match}


def carried(folder: Path, *, version: str, pinned: Mapping[str, str]) -> Carried:
    """Return what the image carries, after hashing it.

    Args:
        folder: where the binaries are, beside SHA256SUMS and VERSION as the image's build wrote them.
        version: the version that the ConfigMap asks for.
        pinned: digests that the ConfigMap asks for, by file name.

    Raises:
        NotReadyError: a digest or the version differs, or a file is missing.
    """
    try:
        built = parse_checksums((folder / CHECKSUMS).read_text("ascii"))
        built_version = (folder / VERSION).read_text("ascii").strip()
        digests = {name: sha256(folder / name) for name in BINARIES}
    except (OSError, ValueError) as error:
        raise NotReadyError(Reason.CHECKSUM_MISMATCH, f"the image is incomplete: {error}") from error
    for name, digest in digests.items():
        for who, wanted in (("the image's build", built.get(name)), ("the ConfigMap", pinned.get(name, digest))):
            if digest != wanted:
                raise NotReadyError(
                    Reason.CHECKSUM_MISMATCH, f"{name} has SHA-256 {digest}, {who} says {wanted or 'nothing of it'}"
                )
    if built_version != version:
        raise NotReadyError(
            Reason.VERSION_MISMATCH, f"the image carries {built_version}, the ConfigMap asks for {version}"
        )
    return Carried(folder, version, digests)


def state(root: Path, release: Release) -> Literal["absent", "whole"]:
    """Tell whether the release is installed below `root`.

    Raises:
        NotReadyError: its folder exists with other contents than its name says.
    """
    folder = root / release.name
    if not folder.exists():
        return "absent"
    for name, wanted in release.digests.items():
        try:
            found = sha256(folder / name)
        except OSError as error:
            found = f"nothing ({error.strerror})"
        if found != wanted:
            raise NotReadyError(
                Reason.INSTALLED_FILE_CHANGED,
                f"{release.name}/{name} was installed with SHA-256 {wanted} and now has {found}; "
                "find out who changed it, then replace the node",
            )
    return "whole"


def install(root: Path, release: Release) -> None:
    """Put the release below `root`; another reader sees all of it or none.

    Raises:
        NotReadyError: what was written does not read back as it should, or cannot be written.
    """
    target = root / release.name
    partial = root / f".{release.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o755)
        for name in BINARIES:
            shutil.copyfile(release.carried.folder / name, partial / name)
            (partial / name).chmod(0o755)
        (partial / RUNSC_CONFIG).write_text(release.runsc_config, "utf-8")
        for name, wanted in release.digests.items():
            _flush(partial / name)
            if sha256(partial / name) != wanted:
                raise NotReadyError(
                    Reason.CHECKSUM_MISMATCH, f"{name} was not written as it was read: is the disk sound?"
                )
        _flush(partial)
        partial.rename(target)
        _flush(root)
    except OSError as error:
        raise NotReadyError(Reason.HOST_FILE_FAILED, f"installing {release.name}: {error}") from error


def write_file(path: Path, text: str) -> None:
    """Replace a small file of the node's as a whole, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.chmod(0o644)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise NotReadyError(Reason.HOST_FILE_FAILED, f"writing {path.name}: {error}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unused(root: Path, *, keep: str, processes: Path) -> list[str]:
    """Remove what older installers left and no process executes any more; return the names of what went.

    Args:
        root: the folder of all releases.
        keep: the release in force.
        processes: a /proc that shows the node's processes.
    """
    executing = set(_executables(processes))
    removed = []
    for folder in sorted(root.iterdir()):
        ours = _FOLDER.fullmatch(folder.name) and folder.name != keep
        if ours and not any(_identity(file) in executing for file in folder.iterdir()):
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _executables(processes: Path) -> Iterator[tuple[int, int]]:
    for process in processes.iterdir():
        if process.name.isdigit():
            try:
                yield _identity(process / "exe")
            except (FileNotFoundError, ProcessLookupError):
                continue  # A thread of the kernel, or gone.
