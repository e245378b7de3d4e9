"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from crucible_policies.resource import Resource


@dataclass(frozen=True)
class Rule:
    """A rule, and what people are told of it.

    Attributes:
        name: by which Pulumi knows it.
        refuses: what it does not let through.
        because: what would come of it.
        instead: how to make it pass.
    """

    name: str
    refuses: str
    because: str
    instead: str


@dataclass(frozen=True)
class ResourceRule(Rule):
    """A rule that looks at one resource at a time, before it is made.

    Attributes:
        check: tells what is wrong, each with the property and what to do.
    """

    check: Callable[[Resource], Iterable[str]]


@dataclass(frozen=True)
class StackRule(Rule):
    """A rule that looks at all resources together.

    Attributes:
        check: tells what is wrong with which of them.
    """

    check: Callable[[Sequence[Resource]], Iterator[tuple[Resource, str]]]
