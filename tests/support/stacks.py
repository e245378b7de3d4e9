"""The tracked stacks as they are once images are in the registry, when everything of them is there."""

from __future__ import annotations

import hashlib

from crucible_platform.cli import INSTALLER, RUNNER, SERVERS, stack_values, with_images

REGISTRY = "registry.example.org"


def image(name: str) -> str:
    """Return a reference by a digest that no image has."""
    return f"{REGISTRY}/{name}@sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def whole_stack(stack: str) -> dict[str, str]:
    """Return what Pulumi would have for a stack, as `stack_values` does, with every image named."""
    values = stack_values(stack)
    return values | with_images(values, "".join(f"{name} {image(name)}\n" for name in (RUNNER, INSTALLER, *SERVERS)))
