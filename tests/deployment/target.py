"""Which cluster is meant, whether it may be deployed to without asking, and how images get there."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.cluster import ClusterError, UnsupportedHereError, open_cluster
from tests.cluster.external import ExternalCluster
from tests.deployment.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.cluster import Cluster
    from tests.deployment.images import Image

API_NODE_PORT = 30080


def run(command: Sequence[str], *, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it wrote to standard output; `environment` is added to our own.

    Raises:
        DeployError: it failed, with its own words.
    """
    try:
        done = subprocess.run(
            command, input=stdin, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise DeployError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise DeployError(f"{' '.join(command[:6])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True)
class Target:
    """A cluster. `own` is set where it is one of this machine, made by `make cluster-up`."""

    kubectl: tuple[str, ...]
    description: str
    own: Cluster | None = None
    registry: str | None = None

    def call(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl on it."""
        return run([*self.kubectl, *arguments], stdin=stdin)

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the objects that `kubectl get` finds."""
        found = json.loads(self.call("get", *arguments, "--output=json"))
        return list(found["items"]) if found["kind"] == "List" else [found]

    def apply(self, objects: Sequence[dict[str, Any]]) -> None:
        """Make objects in it what they are to be; several appliers may own an object's parts, and we own these."""
        arguments = ["apply", "--server-side", "--force-conflicts", "--field-manager=crucible-deploy", "--filename=-"]
        self.call(*arguments, stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    @contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """Give the variables with which a program's own `kubectl` finds the cluster, for as long as the block lasts."""
        with tempfile.TemporaryDirectory() as folder:
            kubeconfig = Path(folder) / "kubeconfig"
            kubeconfig.touch(0o600)
            kubeconfig.write_text(self.call("config", "view", "--raw", "--minify", "--flatten"), encoding="utf-8")
            programs = str(Path(self.kubectl[0]).parent) if os.sep in self.kubectl[0] else ""
            path = os.pathsep.join(filter(None, (programs, os.environ.get("PATH", ""))))
            yield {"KUBECONFIG": str(kubeconfig), "PATH": path}

    def take(self, images: Sequence[Image]) -> None:
        """Give it images.

        Raises:
            DeployError: there is no way to.
        """
        if self.registry is not None:
            for image in images:
                reference = f"{self.registry}/{image.name}:{image.digest.removeprefix('sha256:')[:12]}"
                run(["skopeo", "copy", "--preserve-digests", f"oci-archive:{image.archive}", f"docker://{reference}"])
        elif self.own is not None:
            for image in images:
                if not self._has(image):
                    self.own.import_image(image.archive)
        else:
            raise DeployError(
                f"{self.description} can only pull images: name a registry that it pulls from with --registry"
            )

    def _has(self, image: Image) -> bool:
        """Tell whether every node has an image, as far as the nodes have said."""
        return all(
            any(image.reference in (known.get("names") or ()) for known in node["status"].get("images") or ())
            for node in self.get("nodes")
        )

    @property
    def api_url(self) -> str:
        """Where the API answers for this machine, once it is deployed."""
        if self.own is not None:
            with suppress(UnsupportedHereError):
                return self.own.node_port_url(API_NODE_PORT)
        addresses = [
            address["address"]
            for node in self.get("nodes")
            for address in node["status"]["addresses"]
            if address["type"] == "InternalIP"
        ]
        return f"http://{addresses[0]}:{API_NODE_PORT}"


def _is_local(server: str) -> bool:
    host = urlsplit(server).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _of_kubeconfig(context: str | None, registry: str | None) -> Target:
    chosen = ["--context", context] if context else []
    view = json.loads(run(["kubectl", *chosen, "config", "view", "--minify", "--output=json"]))
    server, name = view["clusters"][0]["cluster"]["server"], view["contexts"][0]["name"]
    if not _is_local(server) and not context:
        raise DeployError(
            f"context {name} is of {server}, which is not on this machine: say --context {name} if that is what you mean"
        )
    return Target(("kubectl", *chosen), f"context {name} ({server})", registry=registry)


def find_target(context: str | None = None, registry: str | None = None, *, cluster: Cluster | None = None) -> Target:
    """Return the cluster that is meant: the one of `--context` or KUBECONFIG, else the one of this machine that is up.

    Raises:
        DeployError: there is none, it does not answer, or it is not on this machine and was not named.
    """
    own = cluster or open_cluster()
    if context or isinstance(own, ExternalCluster):
        target = _of_kubeconfig(context, registry)
    else:
        try:
            command = tuple(map(str, own.kubectl_command()))
        except ClusterError:
            raise DeployError(
                "no cluster: `make cluster-up` brings one up on this machine, KUBECONFIG or --context name another"
            ) from None
        target = Target(command, f"cluster {own.name}", own, registry)
    try:
        target.call("get", "--raw", "/readyz", "--request-timeout=10s")
    except DeployError as error:
        raise DeployError(f"{target.description} does not answer: {error}") from None
    return target
