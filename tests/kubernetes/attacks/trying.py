"""Tries attacks, each in a process of its own, and says as a line of JSON what was tried, whether it worked and how it failed.

Runs inside the sandbox, so it is the standard library alone and trusts nothing that an attack leaves behind: an attack may crash,
hang, exhaust its limits or close every descriptor, and the next one is still tried.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# What the attacks may know of the cluster, as an attacker who has studied it would: addresses, names, limits.
Facts = dict[str, Any]
AnyAttack = Callable[[Facts], str]

ATTACKS: dict[str, AnyAttack] = {}
SECONDS = 12.0
AT_ONCE = 6
CLONE_NEWUSER = 0x10000000
# Signals by which a sandbox says no.
REFUSING = {signal.SIGSYS, signal.SIGKILL, signal.SIGXFSZ, signal.SIGXCPU}


class RefusedError(Exception):
    """The attack did not work, in a way that no error number says."""


class Result(NamedTuple):
    """What became of an attack: `worked`, `denied`, or `broken` if it failed by a mistake of its own."""

    attack: str
    tried: str
    outcome: str
    how: str


def runner(facts: Facts) -> int:
    """Return a process that is there and is not the program's own: in an evaluation, the runner that watches the code and tells how it
    ends.

    Raises:
        RefusedError: there is none to be seen.
    """
    parents = {}
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(name)}/stat", encoding="utf-8", errors="replace") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except (ValueError, OSError):
            continue
    for process in sorted(parents):
        ancestor = process
        while ancestor not in (0, facts["own"]):
            ancestor = parents.get(ancestor, 0)
        if ancestor == 0:
            return process
    raise RefusedError("there are no processes but the program's own")


def also_as_root_of_a_user_namespace(function: AnyAttack) -> AnyAttack:
    """Where an attack is denied, have it tried once more by the root of a new user namespace, if one can be made."""

    @functools.wraps(function)
    def tried_twice(facts: Facts) -> str:
        try:
            return function(facts)
        except (OSError, RefusedError) as denial:
            if not become_root_of_a_user_namespace():
                raise
            try:
                return f"{function(facts)} as root of a user namespace"
            except (OSError, RefusedError):
                raise denial from None

    return tried_twice


def become_root_of_a_user_namespace() -> bool:
    """Move this process into a new user namespace, with all capabilities there; tell whether that worked."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        except OSError:
            # The capabilities are there without a name for the user too.
            continue
    return True


def attack(function: AnyAttack) -> AnyAttack:
    """Make a function an attack, named like the function; its docstring says what is tried."""
    ATTACKS[function.__name__] = function
    return function


def tried(name: str) -> str:
    """Say in words what an attack tries."""
    return (ATTACKS[name].__doc__ or "").strip().splitlines()[0]


def judge(name: str, facts: Facts) -> Result:
    """Try one attack in this process."""
    try:
        return Result(name, tried(name), "worked", ATTACKS[name](facts))
    except RefusedError as refused:
        how = str(refused)
    except TimeoutError:
        how = "no answer"
    except OSError as error:
        how = errno.errorcode.get(error.errno or 0, type(error).__name__)
    except MemoryError:
        how = "MemoryError"
    except Exception as error:  # whatever an attack does wrong is told, and the others are still tried
        return Result(name, tried(name), "broken", f"{type(error).__name__}: {error}")
    return Result(name, tried(name), "denied", how)


class Attempt:
    """An attack under way in a process of its own."""

    def __init__(self, name: str, facts: Facts, seconds: float) -> None:
        self.name = name
        self.until = time.monotonic() + seconds
        self.told = b""
        self.reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.close(self.reading)
            os.write(writing, json.dumps(judge(name, facts)).encode() + b"\n")
            os._exit(0)
        os.close(writing)

    def read(self) -> bool:
        """Take what it told; tell whether that is all. What the attack has started may hold the pipe open for longer."""
        part = os.read(self.reading, 65536)
        self.told += part
        return not part or part.endswith(b"\n")

    def end(self) -> Result:
        """Remove the process and all that it started, and return what became of it."""
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        os.close(self.reading)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self.told:
            return Result(*json.loads(self.told))
        if time.monotonic() >= self.until:
            return Result(self.name, tried(self.name), "broken", "came to no end")
        outcome = "denied" if -status in REFUSING else "broken"
        return Result(self.name, tried(self.name), outcome, f"ended with {status}")


def try_all(names: list[str], facts: Facts, *, seconds: float = SECONDS, at_once: int = AT_ONCE) -> Iterator[Result]:
    """Try these attacks, some at a time, and yield what became of each as it is known."""
    waiting = list(names)
    under_way: list[Attempt] = []
    while waiting or under_way:
        while waiting and len(under_way) < at_once:
            under_way.append(Attempt(waiting.pop(0), facts, seconds))
        soonest = min(attempt.until for attempt in under_way)
        ready = select.select([one.reading for one in under_way], [], [], max(0.0, soonest - time.monotonic()))[0]
        for attempt in list(under_way):
            ended = attempt.reading in ready and attempt.read()
            if ended or time.monotonic() >= attempt.until:
                under_way.remove(attempt)
                yield attempt.end()


def main() -> None:
    """Try what standard input asks for, a JSON object: `facts`, and if not all, the names of the `attacks`."""
    asked = json.load(sys.stdin)
    facts = {**asked.get("facts", {}), "own": os.getpid()}
    names = asked.get("attacks") or list(ATTACKS)
    for result in try_all(names, facts, at_once=asked.get("at_once", AT_ONCE)):
        print(json.dumps(result._asdict()), flush=True)
