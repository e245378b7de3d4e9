"""Registers Kubernetes objects that are YAML in the repository: each as the SDK's own class, so that its properties are known ones."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TYPE_CHECKING, Any

import pulumi

from crucible_platform.manifests import FIRST, name_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crucible_platform.manifests import Object


def register(objects: Iterable[Object], opts: pulumi.ResourceOptions) -> list[pulumi.Resource]:
    """Register objects, those first that others need, and return them.

    Args:
        objects: as `manifests.read` has them.
        opts: parent, provider, and what must be there before all of them.

    Raises:
        ValueError: the SDK has no such kind.
    """
    objects = list(objects)
    made = [_register(each, opts) for each in objects if each["kind"] in FIRST]
    after = pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(depends_on=made))
    return made + [_register(each, after) for each in objects if each["kind"] not in FIRST]


def _register(found: Object, opts: pulumi.ResourceOptions) -> pulumi.Resource:
    kind = kind_of(found["apiVersion"], found["kind"])
    arguments = {_snake(key): value for key, value in found.items() if key not in ("apiVersion", "kind")}
    known = inspect.signature(kind._internal_init).parameters  # noqa: SLF001 - the only place that lists them
    if unknown := arguments.keys() - known.keys():
        raise ValueError(f"{name_of(found)}: {', '.join(sorted(unknown))} is not known of a {found['kind']}")
    made: pulumi.Resource = kind(name_of(found), **arguments, opts=opts)
    return made


def kind_of(api_version: str, kind: str) -> type[Any]:
    """Return the SDK's class of a kind.

    Raises:
        ValueError: it has none.
    """
    group, _, version = api_version.rpartition("/")
    module = f"pulumi_kubernetes.{group.partition('.')[0] or 'core'}.{version}"
    try:
        return getattr(importlib.import_module(module), kind)  # type: ignore[no-any-return]
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"{api_version} {kind}: the SDK has no such kind") from None


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
