"""The `crucible` command: its commands, and how it leaves.

Imported at every call, so it stays light: what only one command needs, that command imports.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from crucible import __version__
from crucible.cli import (
    broker,
    cleanup_cluster,
    consuming,
    demo,
    evaluations,
    following,
    openapi,
    serve,
    setup,
    up,
    upkeep,
)
from crucible.cli.exit_codes import MEANINGS, ExitCode
from crucible.cli.session import Session

# \b keeps the lines as they are.
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code.value:3}  {meaning}" for code, meaning in MEANINGS.items())

app = typer.Typer(
    name="crucible",
    help="Run untrusted Python: queued by strict priority, sandboxed, explained.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Help drawn with rich would take longer than all else that a command does before its request.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("up")(up.up)
app.command("demo")(demo.demo)
app.command("submit")(evaluations.submit)
app.command("batch")(evaluations.batch)
app.command("status")(evaluations.status)
app.command("logs")(following.logs)
app.add_typer(consuming.events, name="events")
app.command("cancel")(evaluations.cancel)
app.command("list")(evaluations.list_evaluations)
app.command("capacity")(upkeep.capacity)
app.command("stats")(upkeep.stats)
app.add_typer(upkeep.storage, name="storage")
app.add_typer(upkeep.dead_letters, name="dead-letters")
app.add_typer(upkeep.keys, name="keys")
app.add_typer(broker.broker, name="broker")
app.command("setup")(setup.setup)
app.add_typer(serve.serve, name="serve")
app.command("cleanup-cluster")(cleanup_cluster.cleanup_cluster)
app.command("openapi")(openapi.openapi)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crucible {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def _report_usage(error: TyperException) -> None:
    """Show what is wrong with the command line: as JSON where that was asked for, else as typer shows it."""
    if "--json" in sys.argv:
        problem = {"type": "about:blank", "title": "The command line is wrong", "detail": error.format_message()}
        sys.stderr.write(json.dumps(problem, indent=2) + "\n")
        return
    show = getattr(error, "show", None)
    if show is None:
        sys.stderr.write(f"Error: {error.format_message()}\n")
    else:
        show()


def _leave(code: int) -> NoReturn:
    """End the process, with an exit code that also says if whoever reads our output went away."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = ExitCode.READER_GONE
    if code == ExitCode.READER_GONE:
        # Python would flush once more at exit, and complain about the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def main() -> NoReturn:
    """Run the command and leave with one of the documented exit codes."""
    try:
        code = app(prog_name="crucible", standalone_mode=False)
    except TyperException as error:
        _report_usage(error)
        code = ExitCode.USAGE
    except typer.Abort:
        code = ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last resort: a mistake of ours, told with its own exit code
        _report_mistake(error)
        code = ExitCode.INTERNAL
    _leave(code or ExitCode.OK)


def _report_mistake(error: Exception) -> None:
    if "--json" in sys.argv:
        Session(as_json=True).report({"type": "about:blank", "title": "A mistake in crucible", "detail": repr(error)})
    else:
        sys.excepthook(type(error), error, error.__traceback__)


if __name__ == "__main__":
    main()
