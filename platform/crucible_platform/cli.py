"""`crucible-platform`: what an operator of the infrastructure asks before, and besides, `pulumi up`. It changes nothing by itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from crucible_platform.manifests import FIRST
from crucible_platform.place import PREFIX
from crucible_platform.section import ROOT
from crucible_platform.stack import EXAMPLE_FILE, LOCAL, ORGANISATION_FILE, ORGANISATION_VARIABLE, REFERENCE
from crucible_platform.upgrade.command import app as upgrade

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from crucible_platform.rehearsal import Rehearsal, Rehearsed

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(upgrade, name="upgrade")
RUNNER, INSTALLER, SERVERS = "runner", "gvisor-installer", ("postgres", "rabbitmq", "redis")
StackOption = Annotated[str, typer.Option("--stack", "-s", help="dev, staging, production or local")]


def main() -> None:
    """Run the command line."""
    app()


def stack_values(stack: str) -> dict[str, str]:
    """Return what Pulumi would have for a stack: each key's text, or JSON where it is more than text.

    Raises:
        typer.BadParameter: there is no such stack.
    """
    path = ROOT / f"Pulumi.{stack}.yaml"
    if not path.exists():
        known = ", ".join(sorted(found.stem.removeprefix("Pulumi.") for found in ROOT.glob("Pulumi.*.yaml")))
        raise typer.BadParameter(f"there is no {path.name}; there are {known}")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}


def rehearsal_of(stack: str, values: Mapping[str, str] | None = None) -> Rehearsal:
    """Rehearse a stack, by its own values or others, with the example of an organisation where there is no file of one's own."""
    import pulumi  # noqa: PLC0415 - takes a second, which `--help` need not wait for

    from crucible_platform.rehearsal import rehearse_platform  # noqa: PLC0415

    if stack != LOCAL and ORGANISATION_VARIABLE not in os.environ and not (ROOT / ORGANISATION_FILE).exists():
        stands_in = f"there is no {ORGANISATION_FILE}: {EXAMPLE_FILE} stands in for it, with accounts that do not exist"
        typer.echo(stands_in, err=True)
        os.environ[ORGANISATION_VARIABLE] = str(ROOT / EXAMPLE_FILE)
    try:
        return rehearse_platform(stack, values or stack_values(stack))
    except pulumi.RunError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


@app.command()
def preview(stack: StackOption) -> None:
    """Show all that a stack consists of, without an account: what `pulumi preview` shows of a stack that is not there yet."""
    found = rehearsal_of(stack)
    made = [each for each in found.resources if each.custom and not each.type.startswith("pulumi:providers:")]
    typer.echo("\n".join(tree(found)))
    kinds = Counter(each.type.rpartition(":")[2] for each in made)
    typer.echo(f"\n{len(made)} resources: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))


def tree(found: Rehearsal) -> list[str]:
    """Return a line for each resource, below what it is part of. The order is that of names, since Pulumi's own differs from run to run."""
    parts: dict[str, list[Rehearsed]] = {}
    known = {each.urn for each in found.resources}
    for each in sorted(found.resources, key=lambda each: (each.type, each.name)):
        parts.setdefault(each.parent if each.parent in known else "", []).append(each)

    def lines(parent: str, depth: int) -> Iterator[str]:
        for each in parts.get(parent, []):
            yield f"{'  ' * depth}{each.type}  {each.name}"
            yield from lines(each.urn, depth + 1)

    return list(lines("", 0))


@app.command()
def graph(stack: StackOption) -> None:
    """Print which component needs which, as a Mermaid flowchart."""
    found = rehearsal_of(stack)
    typer.echo("\n".join(["flowchart LR", *component_edges(found)]))


def component_edges(found: Rehearsal) -> list[str]:
    """Return a line for each component, and one for each that needs another."""
    by_urn = {each.urn: each for each in found.resources}

    def component(each: Rehearsed) -> Rehearsed | None:
        top = each
        while top.parent in by_urn:
            top = by_urn[top.parent]
        return None if top.custom else top

    names: dict[str, str] = {}
    edges = set()
    for each in found.resources:
        if not (own := component(each)):
            continue
        names.setdefault(own.urn, own.type.removeprefix("crucible:").replace(":", "_"))
        for needed in each.depends_on:
            other = component(by_urn[needed]) if needed in by_urn else None
            if other and other.urn != own.urn:
                edges.add((own.urn, other.urn))
    lines = [f"  {name}[{name.rpartition('_')[2]}]" for name in names.values()]
    return lines + sorted(f"  {names[one]} --> {names[other]}" for one, other in edges)


@app.command("config-docs")
def config_docs(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page differs")] = False,
    page: Annotated[Path, typer.Option(help="The page")] = ROOT / REFERENCE,
) -> None:
    """Write the reference of every key of a stack's configuration."""
    from crucible_platform.config_docs import reference  # noqa: PLC0415

    wanted = reference()
    if page.exists() and page.read_text(encoding="utf-8") == wanted:
        return
    if check:
        typer.echo(f"{page.name}: it is not what the models say; run `make docs`", err=True)
        raise typer.Exit(1)
    page.write_text(wanted, encoding="utf-8")


@app.command()
def cost(stack: StackOption) -> None:
    """Estimate what a stack costs in a month by being there, part by part, at list prices whose date is told."""
    from crucible_platform.costs import estimate, load_prices  # noqa: PLC0415

    prices = load_prices()
    found = estimate(rehearsal_of(stack), prices)
    typer.echo(
        f"{stack}: USD a month at the on-demand list prices of {prices.region}, {prices.as_of}; what is paid for by use comes on top"
    )
    for part, items in found.parts.items():
        typer.echo(f"{part:14} {sum(usd for _, usd in items.values()):10.2f}")
        for item, (count, usd) in items.items():
            typer.echo(f"  {item:24} {count:8g} {usd:10.2f}")
    typer.echo(f"{'in all':14} {found.total:10.2f}")
    for each in sorted(found.unpriced):
        typer.echo(f"not priced: {each}", err=True)


@app.command()
def render(
    stack: StackOption,
    images: Annotated[
        typer.FileText | None,
        typer.Option(help="What `make images` printed (`-`: from standard input), for a stack that has no images yet"),
    ] = None,
) -> None:
    """Print every Kubernetes object of a stack as YAML, in an order that `kubectl apply` can take them in; no cluster is asked."""
    values = stack_values(stack) | (with_images(stack_values(stack), images.read()) if images else {})
    typer.echo(yaml.safe_dump_all(manifests(rehearsal_of(stack, values))), nl=False)


def with_images(values: Mapping[str, str], printed: str) -> dict[str, str]:
    """Return those keys of a stack that name images, with the images that were built.

    Args:
        values: the stack's keys.
        printed: a line for each image, whose first two words are its name and its reference by digest.

    Raises:
        typer.BadParameter: one of the images is missing.
    """
    built = dict(line.split()[:2] for line in printed.splitlines() if line.strip())
    if missing := {RUNNER, INSTALLER, *SERVERS} - built.keys():
        names = " ".join(sorted(missing))
        raise typer.BadParameter(f"{names}: not among the images; make images NAMES='{names}' builds them")

    def changed(key: str, **fields: object) -> tuple[str, str]:
        return f"{PREFIX}:{key}", json.dumps(json.loads(values[f"{PREFIX}:{key}"]) | fields)

    return dict(
        [
            changed("policies", images={"python": built[RUNNER]}),
            changed("sandbox_runtime", installer=built[INSTALLER]),
            changed("servers", images={name: built[name] for name in SERVERS}),
        ]
    )


def manifests(found: Rehearsal) -> list[dict[str, Any]]:
    """Return the Kubernetes objects that a program registers: what others are in first, then by name."""

    def order(each: dict[str, Any]) -> tuple[bool, bool, str, str, str]:
        kind, metadata = each["kind"], each["metadata"]
        return kind != "Namespace", kind not in FIRST, kind, metadata.get("namespace", ""), metadata["name"]

    objects = [_whole(each.inputs) for each in found.resources if each.type.startswith("kubernetes:")]
    return sorted(objects, key=order)


def _whole(value: Any) -> Any:
    """Return a value in which numbers are whole again: on its way to the engine each is a float."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
