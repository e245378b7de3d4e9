"""One Python file made of several modules, for where nothing can be installed: a sandbox runs a single file."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

_HEAD = """import sys, types

def _module(name, source):
    module = types.ModuleType(name)
    module.__file__ = __file__
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)

"""


def bundle(*modules: ModuleType, run: str) -> str:
    """Return the text of a program: these modules, each importable under its own name, and then the code `run`.

    The modules may import each other in the order given, and otherwise only what the program's Python has.
    """
    parts = [f"_module({module.__name__!r}, {inspect.getsource(module)!r})\n" for module in modules]
    return "".join([_HEAD, *parts, run, "\n"])
