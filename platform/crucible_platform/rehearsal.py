"""Runs a Pulumi program whole with nobody behind it: no engine, no provider, no account. It tells what would be registered.

Pulumi's own mocks answer in AWS's place: each resource gets an id and, where a program may ask for it, an ARN made of its name. What the
provider would refuse is not known here but for what it would not know: `unknown_properties` holds every input, down to the last
nested one, against the SDK, which is generated from the provider's schema.
"""

from __future__ import annotations

import asyncio
import importlib
import keyword
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import pulumi
from pulumi import _types
from pulumi.runtime import mocks, rpc
from pulumi.runtime.config import set_all_config
from pulumi.runtime.settings import SETTINGS, get_root_resource, set_root_resource
from pulumi.runtime.stack import Stack, run_pulumi_func

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PROJECT = "crucible"
PROGRAM = Path(__file__).parents[1] / "__main__.py"
_STACK = "pulumi:pulumi:Stack"


@dataclass(frozen=True)
class Rehearsed:
    """A resource that the program registered.

    Attributes:
        type: its token, such as aws:ec2/vpc:Vpc.
        name: its name in the program.
        inputs: what it was given, by Pulumi's own names; of another resource its rehearsed id or attribute.
        urn: what Pulumi calls it.
        parent: the URN of what it is part of; the stack's own for what is part of nothing.
        depends_on: URNs of what must be there first.
        protected: whether Pulumi refuses to delete it.
        custom: whether a provider makes it; a component is only made of others.
        provider: the URN of the one that makes it; empty if the program did not choose one.
        came_from: of each input, the URNs of the resources that it was made of.
    """

    type: str
    name: str
    inputs: dict[str, Any]
    urn: str
    parent: str
    depends_on: frozenset[str]
    protected: bool
    custom: bool
    provider: str
    came_from: dict[str, frozenset[str]]


@dataclass
class Rehearsal:
    """What a program registered, in its order, and what it exported."""

    resources: list[Rehearsed] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)

    def of(self, type_: str) -> list[Rehearsed]:
        """Return the resources of a type, in order."""
        return [each for each in self.resources if each.type == type_]

    def one(self, type_: str, name: str | None = None) -> Rehearsed:
        """Return the one resource of a type, or of a type and name.

        Raises:
            LookupError: there is none, or more than one.
        """
        found = [each for each in self.of(type_) if name in (None, each.name)]
        if len(found) != 1:
            raise LookupError(
                f"{type_} {name or ''}: {len(found)} and not one, of {sorted({e.type for e in self.resources})}"
            )
        return found[0]

    def below(self, parent: Rehearsed) -> list[Rehearsed]:
        """Return what is part of a component."""
        return [each for each in self.resources if each.parent == parent.urn]


class _Answers(mocks.Mocks):
    """What AWS would answer, as far as programs use it."""

    def call(self, args: mocks.MockCallArgs) -> tuple[dict[str, Any], None]:
        raise LookupError(
            f"the program asks {args.token}, which takes an account; pass what it wants to know as configuration"
        )

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str, dict[str, Any]]:
        name = args.inputs.get("name") or args.inputs.get("bucket") or args.name
        made: dict[str, Any] = {
            "arn": f"arn:aws:rehearsal:::{args.typ.split(':')[1].split('/')[0]}/{name}",
            "name": name,
        }
        if args.typ == "aws:eks/cluster:Cluster":
            made |= {"endpoint": f"https://{name}.example.org", "certificateAuthority": {"data": ""}}
        return f"{args.name}-id", made | args.inputs


class _Monitor(mocks.MockMonitor):
    """Pulumi's own, which also remembers what belongs to what."""

    def __init__(self, found: Rehearsal) -> None:
        super().__init__(_Answers())
        self._found = found

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802 - the protocol's own name
        response = super().RegisterResource(request)  # type: ignore[no-untyped-call]
        if request.type != _STACK:
            inputs = rpc.deserialize_properties(request.object)
            self._found.resources.append(
                Rehearsed(
                    request.type,
                    request.name,
                    dict(inputs),
                    response.urn,
                    request.parent,
                    frozenset(request.dependencies),
                    bool(request.protect),
                    bool(request.custom),
                    request.provider.rpartition("::")[0],
                    {key: frozenset(found.urns) for key, found in request.propertyDependencies.items()},
                )
            )
        return response


def rehearse(
    program: Callable[[], object], *, stack: str = "dev", config: Mapping[str, str] | None = None
) -> Rehearsal:
    """Run a program and return what it registered.

    Args:
        program: what makes resources.
        stack: what the stack is called.
        config: what Pulumi would have for it, `project:key` -> text or JSON.

    Raises:
        Exception: whatever the program raises.
    """
    found = Rehearsal()
    SETTINGS.rpc_manager.clear()
    SETTINGS.outputs.clear()

    def run() -> None:
        program()
        root = get_root_resource()
        assert isinstance(root, Stack)  # noqa: S101 - set_mocks has made it
        pulumi.Output.all(**root.outputs).apply(found.outputs.update)

    async def whole() -> None:
        set_all_config(dict(config or {}))
        # One that an earlier rehearsal left would be the parent of everything here.
        set_root_resource(None)  # type: ignore[arg-type]
        mocks.set_mocks(_Answers(), PROJECT, stack, preview=False, monitor=_Monitor(found))
        await run_pulumi_func(run)

    asyncio.run(whole())
    return found


def rehearse_platform(stack: str, config: Mapping[str, str]) -> Rehearsal:
    """Run the platform's own program, as `pulumi up` would."""
    return rehearse(lambda: runpy.run_path(str(PROGRAM), run_name="__main__"), stack=stack, config=config)


# -- what the provider would not know


def unknown_properties(resource: Rehearsed) -> Iterator[str]:
    """Tell which inputs of a resource its SDK does not know, each by its path."""
    arguments = _arguments(resource.type)
    if arguments is None:
        yield f"{resource.type} {resource.name}: the SDK has no such resource"
        return
    yield from _unknown(arguments, resource.inputs, f"{resource.type} {resource.name}")


def _arguments(token: str) -> type | None:
    package, module, kind = token.split(":")
    kubernetes = package == "kubernetes"
    # aws:ec2/vpc:Vpc is pulumi_aws.ec2.VpcArgs; kubernetes:rbac.authorization.k8s.io/v1:Role is pulumi_kubernetes.rbac.v1.RoleInitArgs. A module
    # that would be a keyword has an underscore more, and where a nested class has the name, the resource's is the one with Init.
    group, _, version = module.partition("/")
    path = f"pulumi_kubernetes.{group.partition('.')[0]}.{version}" if kubernetes else f"pulumi_{package}.{group}"
    try:
        found = importlib.import_module(f"{path}_" if keyword.iskeyword(group) else path)
    except ModuleNotFoundError:
        return None
    return getattr(found, f"{kind}InitArgs", None) or getattr(found, f"{kind}Args", None)


def _unknown(arguments: type, given: Mapping[str, Any], where: str) -> Iterator[str]:
    names = {pulumi_name: name for name, pulumi_name in _types.input_type_py_to_pulumi_names(arguments).items()}
    types = _types.input_type_types(arguments)
    for key, value in given.items():
        if key.startswith("__"):
            continue
        if key not in names:
            yield f"{where}.{key}"
        elif (nested := _nested(types.get(key))) is not None:
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    yield from _unknown(nested, each, f"{where}.{key}")


def _nested(annotation: Any) -> type | None:
    """Return the class of nested arguments that an annotation speaks of, however wrapped."""
    if isinstance(annotation, type) and _types.is_input_type(annotation):
        return annotation
    if get_origin(annotation) is dict:
        return None
    return next((found for each in get_args(annotation) if (found := _nested(each)) is not None), None)
