"""Pulumi's real engine on the platform's real program, with a state of its own in a folder and a stand-in for its providers.

Each act is a process of its own, as each `pulumi up` is: the SDK leaves a half-run program behind in the process where the engine gave up.

    python -m tests.support.pulumi_engine FOLDER STACK up|preview|refresh|destroy PROGRAM [POLICY-PACK]

PROGRAM is a function, such as tests.support.pulumi_engine:platform.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pulumi import automation as auto

from crucible_platform.rehearsal import PROGRAM, PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parents[2]
STAND_IN = (
    "AWS's provider is a stand-in here: the engine, its state and the program are real, what AWS would say is not"
)
PLATFORM = "tests.support.pulumi_engine:platform"
_VARIABLES = "variables.json"
_ACT_SECONDS = 120


class EngineError(Exception):
    """The engine refused or gave up; the text is its own."""


@dataclass
class Engine:
    """A stack of the platform in a folder.

    Attributes:
        folder: of its state, and of what the stand-in makes.
        name: what the stack is called.
    """

    folder: Path
    name: str

    @property
    def made(self) -> Path:
        """Where the stand-in keeps what it made, a file each."""
        return self.folder / "aws"

    def act(self, what: str, *, program: str = PLATFORM, pack: Path | None = None) -> dict[str, int]:
        """Do something, and return how many resources were created, updated, left the same, ...

        Args:
            what: up, preview, refresh or destroy.
            program: a function, by its module and name.
            pack: a policy pack that is asked about it, whose environment is in its folder `.venv`.

        Raises:
            EngineError: it was not done, or only in part.
        """
        packs = [str(pack)] if pack else []
        command = [sys.executable, "-m", __name__, str(self.folder), self.name, what, program, *packs]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=_ACT_SECONDS, check=False)
        if done.returncode:
            raise EngineError(done.stderr or done.stdout)
        return dict(json.loads(done.stdout))

    def objects(self) -> list[dict[str, Any]]:
        """Return what there is, as the stand-in keeps it."""
        return [json.loads(path.read_text()) for path in sorted(self.made.glob("*.json"))]

    def ids(self) -> set[str]:
        """Return the ids of what there is."""
        return {path.stem for path in self.made.glob("*.json")}

    def configure(self, config: Mapping[str, str]) -> None:
        """Set what `Pulumi.<stack>.yaml` says; keys that are not named stay as they are."""
        select(self.folder, self.name, platform).set_all_config(
            {key: auto.ConfigValue(value) for key, value in config.items()}
        )

    def fail_at(self, *names: str) -> None:
        """Have the provider fail at some resources, by name; at none that were named before."""
        (self.made / "failing").write_text(" ".join(names))


def open_stack(
    folder: Path, pulumi: Path, stack: str, config: Mapping[str, str], environment: Mapping[str, str]
) -> Engine:
    """Make a stack in an empty folder.

    Args:
        folder: for state, plugins and what the stand-in makes.
        pulumi: the folder that has bin/pulumi.
        stack: what the stack is called.
        config: what `Pulumi.<stack>.yaml` says.
        environment: what else the program is to see.
    """
    engine, plugins, state = Engine(folder, stack), folder / "bin", folder / "state"
    for each in (engine.made, plugins, state):
        each.mkdir()
    for name in ("aws", "kubernetes"):
        (plugins / f"pulumi-resource-{name}").symlink_to(ROOT / "tests" / "support" / "provider" / "serve")
    (plugins / "pulumi-analyzer-policy-python").symlink_to(ROOT / "tests" / "support" / "provider" / "analyze")
    variables = {
        # Nothing but the engine and the stand-in: a language host would run the program a second way.
        "PATH": f"{plugins}:{pulumi / 'bin'}:/usr/bin:/bin",
        "STAND_IN_FOLDER": str(engine.made),
        "STAND_IN_PYTHON": sys.executable,
        "POLICY_PYTHON": str(ROOT / "policies" / "pulumi" / ".venv" / "bin" / "python"),
        "PULUMI_ROOT": str(pulumi),
        "PULUMI_HOME": str(folder / "home"),
        "PULUMI_BACKEND_URL": state.as_uri(),
        "PULUMI_CONFIG_PASSPHRASE": "of no use anywhere else",
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
        # Its state is written once at an act's end, and not after each resource, which took half of the time. The first is what allows the second.
        "PULUMI_EXPERIMENTAL": "true",
        "PULUMI_SKIP_CHECKPOINTS": "true",
        **environment,
    }
    (folder / _VARIABLES).write_text(json.dumps(variables))
    engine.configure(config)
    return engine


def select(folder: Path, stack: str, program: Callable[[], None]) -> auto.Stack:
    """Return the stack of a folder, made now if it is not there, with what makes its resources."""
    variables = json.loads((folder / _VARIABLES).read_text())
    options = auto.LocalWorkspaceOptions(
        work_dir=str(folder),
        env_vars=variables,
        pulumi_command=auto.PulumiCommand(variables["PULUMI_ROOT"], skip_version_check=True),
        project_settings=auto.ProjectSettings(name=PROJECT, runtime="python"),
    )
    return auto.create_or_select_stack(stack, project_name=PROJECT, program=program, opts=options)


def platform() -> None:
    """Run the platform's own program."""
    runpy.run_path(str(PROGRAM), run_name="__main__")


def _act(stack: auto.Stack, what: str, packs: list[str]) -> Mapping[Any, int]:
    match what:
        case "preview":
            return stack.preview(policy_packs=packs).change_summary
        case "up":
            return stack.up(policy_packs=packs).summary.resource_changes or {}
        case "refresh":
            return stack.refresh().summary.resource_changes or {}
        case "destroy":
            return stack.destroy().summary.resource_changes or {}
    raise ValueError(f"{what}: up, preview, refresh or destroy")


def main(folder: str, name: str, what: str, program: str, *packs: str) -> int:
    """Do one thing and print what it changed."""
    module, _, function = program.partition(":")
    os.environ.update(json.loads((Path(folder) / _VARIABLES).read_text()))
    try:
        makes = getattr(importlib.import_module(module), function)
        changed = _act(select(Path(folder), name, makes), what, list(packs))
    except auto.CommandError as error:
        sys.stderr.write(str(error))
        return 1
    json.dump({str(getattr(key, "value", key)): count for key, count in changed.items()}, sys.stdout)
    return 0


if __name__ == "__main__":
    # Past what the SDK left half done, which has nothing to say any more.
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
