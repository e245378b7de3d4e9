"""The domain: what an evaluation is, which states it passes through, and why it ended.

Pure: no clock, no randomness, no I/O. Everything that stores, runs or shows an evaluation takes its words from here.
"""

from __future__ import annotations

import re
from enum import StrEnum
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from crucible.limits import PRIORITY_MAX, PRIORITY_MIN, Limits, SizeClass
from crucible.quantity import QuantityError, format_cpu, format_memory, parse_cpu, parse_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
EVALUATION_ID_PATTERN = r"^ev-[0-9a-hjkmnp-tv-z]{26}$"
# RFC 9110 leaves the key's form open; visible ASCII of bounded length keeps it loggable and indexable.
IDEMPOTENCY_KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
# Kubernetes label syntax, since labels travel to the Job: an optional DNS subdomain (RFC 1123) before a slash, then a name.
_LABEL_NAME = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_LABEL_KEY = re.compile(rf"(?:(?P<prefix>(?=[^/]{{1,253}}/){_DNS_LABEL}(?:\.{_DNS_LABEL})*)/)?{_LABEL_NAME}")
_LABEL_VALUE = re.compile(rf"(?:{_LABEL_NAME})?")
# Ours, and those that Kubernetes keeps for its own parts: a person's label must not steer a controller or a policy.
_RESERVED_LABEL_DOMAINS = ("crucible.dev", "kubernetes.io", "k8s.io")
# Enough to recognise a refused value by, and never a whole source text.
_SHOWN_CHARACTERS = 80

EvaluationId = Annotated[str, Field(pattern=EVALUATION_ID_PATTERN, examples=["ev-01jd3v8q6m0c3r5x7z9b1d3f5h"])]


def make_evaluation_id(unix_ms: int, entropy: bytes) -> str:
    """Build a sortable id that is also a valid Kubernetes name: `ev-` and a lower-case ULID.

    Args:
        unix_ms: the time of submission, milliseconds since 1970, below 2**48.
        entropy: 10 random bytes.

    Raises:
        ValueError: either argument is out of range.
    """
    if len(entropy) != 10 or not 0 <= unix_ms < 2**48:
        raise ValueError("an evaluation id needs a 48-bit time and 10 bytes of entropy")
    value = (unix_ms << 80) | int.from_bytes(entropy, "big")
    return "ev-" + "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -5, -5))


class State(StrEnum):
    """Where an evaluation is in its life."""

    SUBMITTED = "submitted"
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing can follow this state."""
        return self in TERMINAL_STATES


TERMINAL_STATES = frozenset({State.COMPLETED, State.FAILED, State.TIMEOUT, State.CANCELLED})
ACTIVE_STATES = frozenset(State) - TERMINAL_STATES
# States in which a worker holds the evaluation and a sandbox may exist.
HELD_STATES = frozenset({State.PROVISIONING, State.RUNNING})

# Going back to QUEUED is what happens when a worker or node is lost with the evaluation in hand: the attempt is void and another
# may start. Everything else only moves forward.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.SUBMITTED: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
        State.QUEUED: frozenset({State.PROVISIONING, State.FAILED, State.TIMEOUT, State.CANCELLED}),
        State.PROVISIONING: frozenset({State.RUNNING, State.QUEUED, State.FAILED, State.TIMEOUT, State.CANCELLED}),
        State.RUNNING: frozenset({State.QUEUED, State.COMPLETED, State.FAILED, State.TIMEOUT, State.CANCELLED}),
        State.COMPLETED: frozenset(),
        State.FAILED: frozenset(),
        State.TIMEOUT: frozenset(),
        State.CANCELLED: frozenset(),
    }
)


class Reason(StrEnum):
    """Why an evaluation ended, or why an attempt at it was void."""

    EXIT_ZERO = "exit_zero"
    EXIT_NONZERO = "exit_nonzero"
    EXCEPTION = "exception"
    SIGNAL = "signal"
    OOM_KILLED = "oom_killed"
    OUTPUT_LIMIT = "output_limit"
    WALL_CLOCK = "wall_clock"
    DEADLINE = "deadline"
    QUEUE_WAIT = "queue_wait"
    SCHEDULING = "scheduling"
    EVICTED = "evicted"
    PREEMPTED = "preempted"
    NODE_LOST = "node_lost"
    IMAGE_ERROR = "image_error"
    SANDBOX_ERROR = "sandbox_error"
    CANCELLED_BY_USER = "cancelled_by_user"
    CANCELLED_BY_OPERATOR = "cancelled_by_operator"


TERMINAL_REASONS: Mapping[State, frozenset[Reason]] = MappingProxyType(
    {
        State.COMPLETED: frozenset({Reason.EXIT_ZERO}),
        State.TIMEOUT: frozenset({Reason.WALL_CLOCK, Reason.DEADLINE, Reason.QUEUE_WAIT, Reason.SCHEDULING}),
        State.CANCELLED: frozenset({Reason.CANCELLED_BY_USER, Reason.CANCELLED_BY_OPERATOR}),
        State.FAILED: frozenset(
            {
                Reason.EXIT_NONZERO,
                Reason.EXCEPTION,
                Reason.SIGNAL,
                Reason.OOM_KILLED,
                Reason.OUTPUT_LIMIT,
                Reason.EVICTED,
                Reason.PREEMPTED,
                Reason.NODE_LOST,
                Reason.IMAGE_ERROR,
                Reason.SANDBOX_ERROR,
            }
        ),
    }
)
# Causes that lie with the platform and not with the code: the attempt is void and may be made again.
RETRYABLE_REASONS = frozenset({Reason.NODE_LOST, Reason.SANDBOX_ERROR, Reason.EVICTED, Reason.PREEMPTED})


class TransitionError(ValueError):
    """A transition that the lifecycle does not allow; the message names both ends and what would be allowed."""


def check_transition(current: State, target: State, reason: Reason | None) -> None:
    """Accept a transition or say why it is impossible.

    Raises:
        TransitionError: the lifecycle has no such step, or the reason does not belong to the terminal state.
    """
    if target not in TRANSITIONS[current]:
        allowed = ", ".join(sorted(TRANSITIONS[current])) or "nothing: it is final"
        raise TransitionError(f"an evaluation that is {current} cannot become {target}; allowed: {allowed}")
    if target.terminal and (reason is None or reason not in TERMINAL_REASONS[target]):
        allowed = ", ".join(sorted(TERMINAL_REASONS[target]))
        raise TransitionError(f"{target} needs a reason of its own, not {reason or 'none'}; allowed: {allowed}")


def terminal_state_of(reason: Reason) -> State:
    """Return the one terminal state that a reason belongs to."""
    return next(state for state, reasons in TERMINAL_REASONS.items() if reason in reasons)


class Resources(BaseModel):
    """What a sandbox may use at most, resolved from quantities or a profile."""

    model_config = ConfigDict(frozen=True)

    cpu_millis: int = Field(ge=1, description="CPU limit, millicores")
    memory_bytes: int = Field(ge=1, description="Memory limit, bytes")


class EvaluationRequest(BaseModel):
    """What a person submits. Field by field it is only typed here; `resolve` holds it against the installation's limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str = Field(description="Python source, run as `__main__`", examples=["print('hello')"])
    language: Literal["python"] = Field("python", description="Only Python is run")
    stdin: str = Field("", description="Text that the code finds on its standard input")
    priority: int | None = Field(
        None, strict=True, description=f"{PRIORITY_MIN} (last) to {PRIORITY_MAX} (first)", examples=[5]
    )
    timeout_seconds: int | None = Field(
        None, strict=True, description="Wall-clock limit of the run, seconds", examples=[60]
    )
    queue_timeout_seconds: int | None = Field(
        None,
        strict=True,
        description="Longest wait in the queue, seconds; after it the evaluation ends as `timeout` with reason `queue_wait`",
    )
    profile: str | None = Field(
        None, description="Named CPU and memory limits; explicit limits override its parts", examples=["small"]
    )
    memory_limit: str | None = Field(None, description="Memory limit, a Kubernetes quantity", examples=["512Mi"])
    cpu_limit: str | None = Field(None, description="CPU limit, a Kubernetes quantity", examples=["500m"])
    image: str | None = Field(
        None, description="Runtime image, one of those that the installation lists", examples=["python"]
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Labels in Kubernetes' syntax, for finding evaluations again"
    )


class EvaluationSpec(BaseModel):
    """A request with every default filled in and every limit checked: what is stored and run."""

    model_config = ConfigDict(frozen=True)

    code: str
    stdin: str = ""
    priority: int = Field(ge=PRIORITY_MIN, le=PRIORITY_MAX)
    timeout_seconds: int = Field(ge=1)
    queue_timeout_seconds: int | None = None
    resources: Resources
    size_class: SizeClass
    image: str
    labels: dict[str, str] = Field(default_factory=dict)


class Violation(BaseModel):
    """One thing wrong with a request, in words that let its author mend it."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Where in the request, as a dotted path")
    message: str = Field(description="What is wrong, for a person")
    value: str | None = Field(None, description="The value that was refused, shortened")
    limit: str | None = Field(None, description="The limit that it broke")
    accepted: str | None = Field(None, description="What would be accepted")


class RequestRejectedError(ValueError):
    """A request that breaks limits. `violations` names every one, not only the first."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.message}" for v in violations))
        self.violations = violations


def _free_label_key(key: str) -> bool:
    match = _LABEL_KEY.fullmatch(key)
    if match is None:
        return False
    prefix = match["prefix"] or ""
    return not any(prefix == domain or prefix.endswith("." + domain) for domain in _RESERVED_LABEL_DOMAINS)


def _shown(value: str | int) -> str:
    """Print a refused value in ASCII, short; a number with more digits than Python likes to print by its size."""
    if isinstance(value, str):
        return ascii(value[:_SHOWN_CHARACTERS])
    return str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"


def text_problem(text: str) -> str | None:
    """Say why a text cannot be stored and run as UTF-8, or None if it can.

    NUL ends strings in C and is refused by PostgreSQL and by Python's own compiler; lone surrogates have no UTF-8 form.
    """
    if "\x00" in text:
        return (
            f"contains a NUL character at offset {text.index(chr(0))}, which Python source and text columns cannot hold"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains a lone surrogate at offset {error.start}, which has no UTF-8 form"
    return None


class _Checker:
    """Collects every violation of one request; each check returns the usable value or None after recording why not."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.violations: list[Violation] = []

    def refuse(
        self,
        field: str,
        message: str,
        *,
        accepted: str,
        value: str | int | None = None,
        limit: str | None = None,
    ) -> None:
        shown = None if value is None else _shown(value)
        self.violations.append(Violation(field=field, message=message, value=shown, limit=limit, accepted=accepted))

    def text(self, field: str, text: str, largest: int) -> None:
        problem = text_problem(text)
        if problem:
            self.refuse(field, problem, accepted="valid UTF-8 text without NUL")
            return
        size = len(text.encode())
        if size > largest:
            self.refuse(
                field,
                f"is {size} bytes long",
                value=size,
                limit=str(largest),
                accepted=f"at most {largest} bytes of UTF-8",
            )

    def integer(self, field: str, value: int | None, default: int, lowest: int, highest: int) -> int:
        if value is None:
            return default
        if not lowest <= value <= highest:
            span = f"{lowest} to {highest}"
            self.refuse(
                field, f"must be {span}", value=value, limit=str(highest if value > highest else lowest), accepted=span
            )
        return value

    def cpu(self, text: str | None, default: int) -> int:
        lowest, highest = self.limits.cpu_min_millis, self.limits.cpu_max_millis
        try:
            millis = default if text is None else parse_cpu(text)
        except QuantityError as error:
            self.refuse("cpu_limit", str(error), value=text, accepted='"250m" or "2"')
            return default
        if not lowest <= millis <= highest:
            span = f"{format_cpu(lowest)} to {format_cpu(highest)}"
            self.refuse(
                "cpu_limit",
                f"must be {span}",
                value=text or format_cpu(millis),
                limit=format_cpu(highest if millis > highest else lowest),
                accepted=span,
            )
        return millis

    def memory(self, text: str | None, default: int) -> int:
        lowest, highest = self.limits.memory_min_bytes, self.limits.memory_max_bytes
        try:
            size = default if text is None else parse_memory(text)
        except QuantityError as error:
            self.refuse("memory_limit", str(error), value=text, accepted='"256Mi" or "1Gi"')
            return default
        if not lowest <= size <= highest:
            span = f"{format_memory(lowest)} to {format_memory(highest)}"
            self.refuse(
                "memory_limit",
                f"must be {span}",
                value=text or format_memory(size),
                limit=format_memory(highest if size > highest else lowest),
                accepted=span,
            )
        return size

    def labels(self, labels: dict[str, str]) -> None:
        if len(labels) > self.limits.label_count:
            self.refuse(
                "labels",
                f"has {len(labels)} entries",
                value=len(labels),
                limit=str(self.limits.label_count),
                accepted=f"at most {self.limits.label_count}",
            )
        # As many as could be right, lest a hundred thousand bad labels become as many violations.
        for key, value in islice(labels.items(), self.limits.label_count):
            if not _free_label_key(key):
                self.refuse(
                    "labels",
                    "has a key that is not a free Kubernetes label key",
                    value=key,
                    accepted=f"[prefix/]name as in Kubernetes, with no prefix in {', '.join(_RESERVED_LABEL_DOMAINS)}",
                )
            if not _LABEL_VALUE.fullmatch(value):
                self.refuse(
                    "labels",
                    "has a value that is not a Kubernetes label value",
                    value=value,
                    accepted="up to 63 of A-Z a-z 0-9 - _ . between alphanumerics",
                )


def resolve(request: EvaluationRequest, limits: Limits) -> EvaluationSpec:
    """Hold a request against the limits and fill in its defaults.

    Raises:
        RequestRejectedError: with one violation per broken rule; nothing is guessed or clipped.
    """
    check = _Checker(limits)
    check.text("code", request.code, limits.code_bytes)
    if not request.code.strip():
        check.refuse("code", "is empty", accepted="Python source")
    check.text("stdin", request.stdin, limits.stdin_bytes)
    check.labels(request.labels)
    profile = limits.profiles.get(limits.profile_default if request.profile is None else request.profile)
    if profile is None:
        check.refuse(
            "profile",
            "is not a profile of this installation",
            value=request.profile or "",
            accepted=", ".join(limits.profiles),
        )
        profile = limits.profiles[limits.profile_default]
    image = limits.images[0] if request.image is None else request.image
    if image not in limits.images:
        check.refuse(
            "image", "is not a runtime image of this installation", value=image, accepted=", ".join(limits.images)
        )
    resources = Resources(
        cpu_millis=check.cpu(request.cpu_limit, profile.cpu_millis),
        memory_bytes=check.memory(request.memory_limit, profile.memory_bytes),
    )
    priority = check.integer("priority", request.priority, limits.priority_default, PRIORITY_MIN, PRIORITY_MAX)
    timeout = check.integer(
        "timeout_seconds", request.timeout_seconds, limits.timeout_default_s, limits.timeout_min_s, limits.timeout_max_s
    )
    if request.queue_timeout_seconds is not None:
        check.integer("queue_timeout_seconds", request.queue_timeout_seconds, 0, 1, limits.queue_timeout_max_s)
    if check.violations:
        raise RequestRejectedError(check.violations)
    return EvaluationSpec(
        code=request.code,
        stdin=request.stdin,
        priority=priority,
        timeout_seconds=timeout,
        queue_timeout_seconds=request.queue_timeout_seconds,
        resources=resources,
        size_class=limits.size_class(resources.memory_bytes),
        image=image,
        labels=request.labels,
    )
