"""The local overlay with the images of this checkout in it, by digest."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from crucible.names import PLATFORM_NAMESPACE
from tests.deployment.images import REGISTRY, ROOT, RUNNER, Image
from tests.deployment.target import run

if TYPE_CHECKING:
    from collections.abc import Sequence

OVERLAY = ROOT / "gitops" / "overlays" / "local"
SETTINGS = "crucible-settings"
ALLOWED_IMAGES = "evaluation-images"
# What a request calls the one image there is.
IMAGE_NAME = "python"


def kustomization(folder: Path, images: Sequence[Image], registry: str | None) -> dict[str, Any]:
    """Return the layer over the overlay, for a kustomization in `folder`."""
    runner = next(image for image in images if image.name == RUNNER)
    reference = f"{registry or REGISTRY}/{RUNNER}@{runner.digest}"
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(OVERLAY, folder)],
        "images": [
            {
                "name": f"{REGISTRY}/{image.name}",
                "newName": f"{registry or REGISTRY}/{image.name}",
                "digest": image.digest,
            }
            for image in images
        ],
        "configMapGenerator": [
            {
                "name": SETTINGS,
                "namespace": PLATFORM_NAMESPACE,
                "behavior": "merge",
                "literals": [f"CRUCIBLE_KUBERNETES__IMAGES={json.dumps({IMAGE_NAME: reference})}"],
            }
        ],
        "patches": [
            {
                "patch": json.dumps(
                    {
                        "apiVersion": "v1",
                        "kind": "ConfigMap",
                        "metadata": {"name": ALLOWED_IMAGES, "namespace": PLATFORM_NAMESPACE},
                        "data": {IMAGE_NAME: reference},
                    }
                )
            }
        ],
    }


def build(kubectl: Sequence[str], images: Sequence[Image], registry: str | None) -> list[dict[str, Any]]:
    """Return every object of the platform.

    Raises:
        DeployError: kustomize refuses.
    """
    with tempfile.TemporaryDirectory() as name:
        # Relative paths out of a folder that is a link would lead elsewhere.
        folder = Path(name).resolve()
        layer = json.dumps(kustomization(folder, images, registry))
        (folder / "kustomization.yaml").write_text(layer, encoding="utf-8")
        return [found for found in yaml.safe_load_all(run([*kubectl, "kustomize", str(folder)])) if found]
