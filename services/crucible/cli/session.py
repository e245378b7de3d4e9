"""What every command has in common: where the platform is, how to print, and what an error becomes."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer
from rich.console import Console, RenderableType

from crucible.cli.client import ApiError, Client, Document, UnreachableError
from crucible.cli.exit_codes import ExitCode, for_status
from crucible.cli.text import plain
from crucible.data_dir import default_data_dir

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")

_DEFAULT_URL = "http://127.0.0.1:8080"

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="CRUCIBLE_URL",
        help="URL of the platform; without it, the one that `crucible up` runs here.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="CRUCIBLE_API_KEY",
        help="API key; without it, the one of the platform that runs here.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else; errors are JSON on standard error.")
]


# A pipe has no width of its own; wide enough that no line of ours is cut or folded.
_PIPE_WIDTH = 200


def _console(*, stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else _PIPE_WIDTH)


def read_server_file(path: Path) -> dict[str, Any]:
    """Return what a local platform wrote about itself; empty where there is nothing or it is not for us to read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def header_value(text: str, option: str) -> str:
    """Return a text that can be sent as an HTTP header.

    Raises:
        typer.BadParameter: it has characters that cannot.
    """
    if not (text.isascii() and text.isprintable()):
        raise typer.BadParameter("has characters that cannot be sent; visible ASCII can", param_hint=option)
    return text


class Session:
    """One run of one command."""

    def __init__(self, *, url: str | None = None, api_key: str | None = None, as_json: bool = False) -> None:
        self.as_json = as_json
        self._url = url
        self._api_key = api_key
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    @property
    def live(self) -> bool:
        """Whether progress may be drawn: someone watches, and no machine reads."""
        return self.err.is_terminal and not self.as_json

    def client(self) -> Client:
        """Return a client of the platform that the options, the environment or the local server file name.

        A key from the server file goes only to the platform that wrote it, never to another URL.
        """
        server = read_server_file(local_data_dir() / "server.json")
        url = self._url or server.get("url") or _DEFAULT_URL
        key = self._api_key or (server.get("api_key") if url == server.get("url") else None)
        try:
            return Client(url, header_value(key, "--api-key") if key else None)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--url") from None

    def emit(self, document: object, render: Callable[[], RenderableType]) -> None:
        """Print the result: the document for machines, or what `render` makes of it for people."""
        if self.as_json:
            self.emit_json(document)
        else:
            self.out.print(render())

    def emit_json(self, document: object) -> None:
        """Print the one JSON document. ASCII only, so that no text in it can steer a terminal."""
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        sys.stdout.flush()

    def note(self, text: object) -> None:
        """Tell a person what goes on; silent where a machine reads."""
        if not self.as_json:
            self.err.print(plain(text))

    def report(self, problem: Document) -> None:
        """Say what went wrong, on standard error."""
        if self.as_json:
            sys.stderr.write(json.dumps(problem, indent=2) + "\n")
            return
        self.err.print(plain("Error: ", "bold red") + plain(problem.get("title", "")))
        if problem.get("detail"):
            self.err.print(plain("  ") + plain(problem["detail"]))
        for violation in problem.get("violations") or ():
            self.err.print(plain("  ") + plain(violation["field"], "bold") + plain(f": {violation['message']}"))
            if violation.get("accepted"):
                self.err.print(plain(f"    accepted: {violation['accepted']}", "dim"))


def local_data_dir() -> Path:
    """Return the data folder that the environment names, or the default: where `up` writes and the others look."""
    named = os.environ.get("CRUCIBLE_DATA_DIR")
    # As the settings read it, which would be slow to import here.
    return Path(named).expanduser().absolute() if named else default_data_dir()


def command(function: Callable[Concatenate[Session, P], None]) -> Callable[..., None]:
    """Turn a function of a `Session` into a command that speaks to a platform: its options, and exit codes for errors."""
    return _with_options(function, {"url": Url, "api_key": Key, "as_json": Json})


def offline_command(function: Callable[Concatenate[Session, P], None]) -> Callable[..., None]:
    """Turn a function of a `Session` into a command that needs no running platform."""
    return _with_options(function, {"as_json": Json})


def _with_options(function: Callable[Concatenate[Session, P], None], shared: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        session = Session(**{name: options.pop(name) for name in shared})
        try:
            function(session, *args, **options)
        except ApiError as error:
            session.report(error.problem)
            raise typer.Exit(for_status(error.status)) from None
        except UnreachableError as error:
            session.report(unreachable(error))
            raise typer.Exit(ExitCode.UNAVAILABLE) from None
        except BrokenPipeError:
            raise typer.Exit(ExitCode.READER_GONE) from None

    # typer reads the options from the signature: all but the session, and those that are shared.
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "as_json" else None, annotation=kind
        )
        for name, kind in shared.items()
    ]
    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run


def unreachable(error: UnreachableError) -> Document:
    """Return the problem that is shown where no platform answers."""
    return {
        "type": "about:blank",
        "title": "The platform does not answer",
        "detail": f"{error}; `crucible up` starts one on this machine, --url or CRUCIBLE_URL names another",
    }
