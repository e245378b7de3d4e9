"""Prints pip's effective settings as the environment variables that mean the same to uv.

A machine is usually told once, through pip's configuration, where packages come from. uv does not read that, so
`scripts/setup` and `scripts/lock` take it over from here. One `NAME=value` a line; what uv has been told itself is left alone.
Settings may hold credentials, so this prints to its caller only and is never logged.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

# pip's option -> uv's variable, and what joins several values there.
EQUIVALENTS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}


def effective_settings(listing: str) -> dict[str, str]:
    """Read `pip config list`: lines such as `global.cert='/path'`, where `install.` beats `global.` and `:env:.` beats both."""
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, separator, value = line.partition("=")
        section, _, option = key.rpartition(".")
        rank = ranks.get(section)
        if separator and rank is not None and rank >= found.get(option, (-1, ""))[0]:
            found[option] = (rank, str(ast.literal_eval(value)))
    return {option: value for option, (_, value) in found.items()}


def for_uv(settings: dict[str, str], already_set: set[str]) -> dict[str, str]:
    """Return the variables to set for uv, leaving those that someone has set."""
    variables = {}
    for option, (variable, joint) in EQUIVALENTS.items():
        value = joint.join(settings.get(option, "").split())
        if value and variable not in already_set:
            variables[variable] = value
    return variables


def main() -> None:
    """Ask pip and print."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - fixed words
    for name, value in for_uv(effective_settings(listing), set(os.environ)).items():
        sys.stdout.write(f"{name}={value}\n")


if __name__ == "__main__":
    main()
