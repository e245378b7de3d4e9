"""Calico's policies through calicoctl, and the quarantine of a Pod: what `scripts/policies` runs.

The API server stores a malformed Calico policy without a word, and the agents then treat it as absent. calicoctl validates, but only as
it writes. So every file is first offered as a user who may write nothing: what comes back for a valid one is that refusal and no other.
Only when all are valid is anything written, and what was written is read back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ROOT / "policies" / "network" / "calico"
QUARANTINE = ROOT / "policies" / "network" / "quarantine"
# Whom admission lets write Calico's objects (policies/admission/calico-writes.yaml).
WRITER = "system:serviceaccount:crucible:policies"
# Nobody: no role is bound to it.
CHECKER = "crucible:policy-checker"
OURS = "crucible-"
QUARANTINE_POLICY = "crucible-quarantine"
LABEL = "crucible.dev/quarantine"
NODE_NAMESPACE = "crucible-node"
KIND = "globalnetworkpolicy"

Object = dict[str, Any]


class PolicyError(Exception):
    """What is wrong, a line for each finding."""


def _run(argv: Sequence[str], *, stdin: str | None = None, check: bool = True, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(  # noqa: S603 - our own commands
        argv, input=stdin, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    if check and done.returncode:
        raise PolicyError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.returncode, done.stdout, done.stderr


def _kubectl(*args: str, stdin: str | None = None) -> str:
    return _run(["kubectl", *args], stdin=stdin)[1]


def _calicoctl_program() -> str:
    found = os.environ.get("CALICOCTL") or shutil.which("calicoctl")
    if found:
        return found
    return str(Path(_run([str(ROOT / "scripts" / "cluster-tools")])[1].strip()) / "bin" / "calicoctl")


class Calico:
    """calicoctl on the cluster that kubectl is pointed at, as one of two users that the caller may impersonate."""

    def __init__(self, folder: Path) -> None:
        self._program = _calicoctl_program()
        self._configs = {}
        config = json.loads(_kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        for user in (WRITER, CHECKER):
            config["users"][0]["user"]["as"] = user
            path = folder / f"{user.rpartition(':')[2]}.kubeconfig"
            path.touch(0o600)
            path.write_text(json.dumps(config), encoding="utf-8")
            self._configs[user] = str(path)

    def _call(self, user: str, *args: str, stdin: str | None = None, check: bool = True) -> tuple[int, str, str]:
        argv = [self._program, "--allow-version-mismatch", *args]
        return _run(argv, stdin=stdin, check=check, KUBECONFIG=self._configs[user], DATASTORE_TYPE="kubernetes")

    def problem(self, document: Object) -> str | None:
        """Return what calicoctl finds wrong with a policy; None if it is valid."""
        code, _, error = self._call(CHECKER, "apply", "-f", "-", stdin=json.dumps(document), check=False)
        if code == 0:
            raise PolicyError(f"{CHECKER} could write a policy: nobody may have that right")
        refused = "forbidden" in error and CHECKER in error and "error with the following fields" not in error
        return None if refused else " ".join(error.split())

    def apply(self, document: Object) -> None:
        """Write a policy."""
        self._call(WRITER, "apply", "-f", "-", stdin=json.dumps(document))

    def all(self) -> dict[str, Object]:
        """Return the policies of the cluster by name."""
        items = json.loads(self._call(WRITER, "get", KIND, "-o", "json")[1])["items"]
        return {item["metadata"]["name"]: item for item in items}


@contextlib.contextmanager
def _calico() -> Iterator[Calico]:
    with tempfile.TemporaryDirectory() as folder:
        yield Calico(Path(folder))


# --- apply and check ------------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Object]:
    """Read the policies of a folder, by name.

    Raises:
        PolicyError: a file holds something else.
    """
    found: dict[str, Object] = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            name = (document or {}).get("metadata", {}).get("name", "")
            if not name.startswith(OURS) or name in found:
                raise PolicyError(
                    f"{path}: each policy needs a name of its own that begins with {OURS}; found {name!r}"
                )
            found[name] = document
    if not found:
        raise PolicyError(f"{folder}: there are no policies in it")
    return found


def validate(calico: Calico, policies: dict[str, Object]) -> None:
    """Raise with every policy that is not valid."""
    problems = [f"{name}: {problem}" for name, document in policies.items() if (problem := calico.problem(document))]
    if problems:
        raise PolicyError("\n".join(["nothing was applied, since these are not valid:", *problems]))


def differs(wanted: Any, found: Any, at: str = "") -> str | None:
    """Return where what was read back is not what was wanted; what Calico added by default is no difference."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            if key not in found:
                return f"{at}.{key} is missing"
            if difference := differs(value, found[key], f"{at}.{key}"):
                return difference
        return None
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return next((found_at for index, (a, b) in pairs if (found_at := differs(a, b, f"{at}[{index}]"))), None)
    return None if wanted == found else f"{at} is {found!r} and should be {wanted!r}"


def compare(calico: Calico, policies: dict[str, Object]) -> None:
    """Raise with every difference between the files and the cluster, and with whatever is malformed there."""
    there = calico.all()
    problems = []
    for name, document in policies.items():
        if name not in there:
            problems.append(f"{name}: is not in the cluster")
        elif difference := differs(document["spec"], there[name]["spec"], "spec"):
            problems.append(f"{name}: {difference}")
    for name, item in there.items():
        if name.startswith(OURS) and name not in policies:
            problems.append(f"{name}: is in the cluster and in no file")
        bare = {**item, "metadata": {"name": name}}
        if problem := calico.problem(bare):
            problems.append(f"{name}: is malformed in the cluster, so Calico's agents ignore it: {problem}")
    if problems:
        raise PolicyError("\n".join(["the cluster does not have what the files say:", *problems]))


def apply_folder(folder: Path) -> None:
    """Validate all, apply all, read all back."""
    policies = load(folder)
    with _calico() as calico:
        validate(calico, policies)
        for document in policies.values():
            calico.apply(document)
        compare(calico, policies)
    _say(f"{len(policies)} policies applied and read back: {', '.join(policies)}")


def check_folder(folder: Path) -> None:
    """Validate all, and compare with the cluster."""
    policies = load(folder)
    with _calico() as calico:
        validate(calico, policies)
        compare(calico, policies)
    _say(f"{len(policies)} policies are as the files say")


# --- quarantine -----------------------------------------------------------------------------------------------------------


def quarantine(namespace: str, pod: str, image: str) -> None:
    """Label the Pod, and cut what it has open on its node.

    Raises:
        PolicyError: the policy is not in force, the Pod does not run, or connections are left.
    """
    wanted = load(POLICIES)[QUARANTINE_POLICY]
    with _calico() as calico:
        found = calico.all().get(QUARANTINE_POLICY)
    if found is None or differs(wanted["spec"], found["spec"]):
        raise PolicyError(f"{QUARANTINE_POLICY} is not in the cluster as its file says: scripts/policies apply")
    _kubectl("label", "pod", "--namespace", namespace, pod, f"{LABEL}=true", "--overwrite")
    found = json.loads(_kubectl("get", "pod", "--namespace", namespace, pod, "-o", "json"))
    addresses = [entry["ip"] for entry in found["status"].get("podIPs", [])]
    node = found["spec"].get("nodeName")
    if not node or not addresses:
        _say(f"{namespace}/{pod} is closed off; it has no address, so nothing can be open")
        return
    said = _cut(node, image, addresses)
    _say(f"{namespace}/{pod} is closed off; {said}")


def _cut(node: str, image: str, addresses: Sequence[str]) -> str:
    """Run the program that cuts connections as a Pod on a node, and return what it said."""
    _kubectl("apply", "-k", str(QUARANTINE))
    filled = {"name": "cut", "image": image, "args": ["/program/cut_connections.py", *addresses]}
    patch = json.dumps({"spec": {"nodeName": node, "containers": [filled]}})
    template = str(QUARANTINE / "cutter.yaml")
    pod = _kubectl("patch", "--local", "-f", template, "--type", "strategic", "-p", patch, "-o", "json")
    name = json.loads(_kubectl("create", "-f", "-", "-o", "json", stdin=pod))["metadata"]["name"]
    where = ("--namespace", NODE_NAMESPACE)
    try:
        _kubectl(
            "wait",
            *where,
            f"pod/{name}",
            "--for=jsonpath={.status.containerStatuses[0].state.terminated}",
            "--timeout=60s",
        )
        ended = json.loads(_kubectl("get", "pod", *where, name, "-o", "json"))
        said = _kubectl("logs", *where, name).strip()
        (container,) = ended["status"]["containerStatuses"]
        if container["state"]["terminated"]["exitCode"] != 0:
            raise PolicyError(f"closed off, but connections are left open: {said}")
        return said
    finally:
        _kubectl("delete", "pod", *where, name, "--wait=false")


def release(namespace: str, pod: str) -> None:
    """Take the label off again."""
    _kubectl("label", "pod", "--namespace", namespace, pod, f"{LABEL}-")
    _say(f"{namespace}/{pod} is subject to the usual policies again")


def _say(what: str) -> None:
    sys.stderr.write(f"policies: {what}\n")


def main() -> int:
    """Run one command; 1 means that something is wrong, and standard error says what."""
    parser = argparse.ArgumentParser(prog="scripts/policies", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("apply", "check"):
        commands.add_parser(name).add_argument("folder", nargs="?", type=Path, default=POLICIES)
    for name in ("quarantine", "release"):
        command = commands.add_parser(name)
        command.add_argument("namespace")
        command.add_argument("pod")
        if name == "quarantine":
            command.add_argument("--image", required=True, help="one with Python that the Pod's node has or may pull")
    given = parser.parse_args()
    try:
        match given.command:
            case "apply":
                apply_folder(given.folder)
            case "check":
                check_folder(given.folder)
            case "quarantine":
                quarantine(given.namespace, given.pod, given.image)
            case _:
                release(given.namespace, given.pod)
    except PolicyError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
