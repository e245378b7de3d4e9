"""A resource as the rules see it, and what they see where Pulumi does not know a value yet.

In a preview of what is not there yet, an ARN or an id is unknown. Read, it ends the rule for that resource with `NotYetKnown`: neither a
denial nor a pass. Nothing slips through by it: the engine asks the rules of single resources again during `pulumi up`, before it makes the
resource, and then knows every value. Rules of whole stacks run before `up` in the preview alone, so those read no value that may be
unknown, and go by which property came from which resource, which is always known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Unknown:
    """Stands for a value that is not known yet.

    Attributes:
        kind: what pulumi_policy has in its place, given back to it in the end.
    """

    kind: str = ""


class NotYetKnown(Exception):  # noqa: N818 - it is no error
    """A rule cannot be decided now.

    Attributes:
        path: the property, from the resource on.
        unknown: what stands there.
    """

    def __init__(self, path: tuple[str, ...], unknown: Unknown) -> None:
        super().__init__(".".join(path))
        self.path = path
        self.unknown = unknown


class Properties(Mapping[str, Any]):
    """What a resource was given. `in` tells whether something was given at all, also while it is unknown."""

    def __init__(self, values: Mapping[str, Any], path: tuple[str, ...] = ()) -> None:
        self._values = values
        self._path = path

    def __getitem__(self, key: str) -> Any:
        return _seen(self._values[key], (*self._path, key))

    def __contains__(self, key: object) -> bool:
        return self._values.get(key) is not None  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def known(self, key: str) -> Any:
        """Return a value, or None where there is none or none yet."""
        try:
            return self.get(key)
        except NotYetKnown:
            return None


class _Items(Sequence[Any]):
    def __init__(self, values: Sequence[Any], path: tuple[str, ...]) -> None:
        self._values = values
        self._path = path

    def __getitem__(self, index: Any) -> Any:
        return _seen(self._values[index], (*self._path, str(index)))

    def __len__(self) -> int:
        return len(self._values)


def _seen(value: Any, path: tuple[str, ...]) -> Any:
    match value:
        case Unknown():
            raise NotYetKnown(path, value)
        case Mapping():
            return Properties(value, path)
        case str() | bytes():
            return value
        case Sequence():
            return _Items(value, path)
    return value


@dataclass(frozen=True)
class Resource:
    """A resource that Pulumi is about to make or keep.

    Attributes:
        type: its token, such as aws:ec2/vpc:Vpc.
        name: its name in the program.
        properties: what it was given, by Pulumi's own names; for rules of whole stacks, also what it got.
        urn: what Pulumi calls it.
        provider: what its provider was given.
        came_from: property -> URNs of the resources that its value came from. For rules of whole stacks only.
    """

    type: str
    name: str
    properties: Properties
    urn: str = ""
    provider: Properties = field(default_factory=lambda: Properties({}))
    came_from: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def is_part_of(self, other: Resource, key: str, *names: str) -> bool:
        """Whether a property says another resource of the stack, be it by reference or by one of the other's own properties."""
        if other.urn in self.came_from.get(key, ()):
            return True
        said = self.properties.known(key)
        return said is not None and said in {other.properties.known(name) for name in names}


def resource(
    type_: str,
    properties: Mapping[str, Any],
    *,
    name: str = "",
    urn: str = "",
    provider: Mapping[str, Any] | None = None,
    came_from: Mapping[str, frozenset[str]] | None = None,
) -> Resource:
    """Return a resource as the rules see it, of plain values and `Unknown`."""
    return Resource(type_, name, Properties(properties), urn, Properties(provider or {}), came_from or {})


def texts(value: Any) -> tuple[str, ...]:
    """Return what may be given as one text or as several."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def is_on(value: object) -> bool:
    """Whether a switch is on. Some of AWS's are text."""
    return value is True or value == "true"
