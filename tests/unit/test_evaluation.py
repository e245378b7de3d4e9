"""The domain: ids, the life of an evaluation, and what becomes of a request."""

from __future__ import annotations

import re
import string
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from crucible.evaluation import (
    ACTIVE_STATES,
    EVALUATION_ID_PATTERN,
    HELD_STATES,
    RETRYABLE_REASONS,
    TERMINAL_REASONS,
    TERMINAL_STATES,
    TRANSITIONS,
    EvaluationId,
    EvaluationRequest,
    EvaluationSpec,
    Reason,
    RequestRejectedError,
    State,
    TransitionError,
    Violation,
    check_transition,
    make_evaluation_id,
    resolve,
    terminal_state_of,
    text_problem,
)
from crucible.limits import PRIORITY_MAX, PRIORITY_MIN, Limits, Profile, SizeClass
from crucible.quantity import GIB, MIB

pytestmark = pytest.mark.unit

LIMITS = Limits()
# Kubernetes: RFC 1123 subdomain, and a Job's name must fit a label besides.
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def accept(limits: Limits = LIMITS, **fields: object):  # type: ignore[no-untyped-def]
    return resolve(EvaluationRequest.model_validate({"code": "pass", **fields}), limits)


def refuse(limits: Limits = LIMITS, **fields: object) -> dict[str, str]:
    """Return the refused fields, each with what would be accepted."""
    with pytest.raises(RequestRejectedError) as refused:
        accept(limits, **fields)
    for violation in refused.value.violations:
        assert violation.message
        assert violation.accepted
        assert violation.value is None or (violation.value.isascii() and len(violation.value) < 1000)
    return {violation.field: violation.accepted or "" for violation in refused.value.violations}


# --- ids ------------------------------------------------------------------------------------------------------------------

_TIMES = st.integers(0, 2**48 - 1)
_ENTROPY = st.binary(min_size=10, max_size=10)


@given(_TIMES, _ENTROPY)
def test_an_id_is_a_kubernetes_name_and_matches_its_pattern(unix_ms: int, entropy: bytes) -> None:
    name = make_evaluation_id(unix_ms, entropy)
    assert _KUBERNETES_NAME.fullmatch(name)
    assert len(name) <= 63
    assert TypeAdapter(EvaluationId).validate_python(name) == name


@given(_TIMES, _TIMES, _ENTROPY, _ENTROPY)
def test_ids_sort_by_time_then_entropy_and_never_collide(first: int, second: int, left: bytes, right: bytes) -> None:
    one, other = (first, left), (second, right)
    assert (make_evaluation_id(*one) < make_evaluation_id(*other)) == (one < other)
    assert (make_evaluation_id(*one) == make_evaluation_id(*other)) == (one == other)


def test_an_id_is_not_made_from_too_much_or_too_little() -> None:
    for unix_ms, size in [(-1, 10), (2**48, 10), (0, 9), (0, 11)]:
        with pytest.raises(ValueError, match="48-bit time and 10 bytes"):
            make_evaluation_id(unix_ms, bytes(size))


def test_what_only_resembles_an_id_is_refused() -> None:
    for tail in ["", "0" * 25, "0" * 27, "0" * 26 + "\n", "i" * 26, "../" + "0" * 23, "\u0660" * 26]:
        with pytest.raises(ValidationError):
            TypeAdapter(EvaluationId).validate_python("ev-" + tail)
        assert re.fullmatch(EVALUATION_ID_PATTERN, "ev-" + tail) is None


# --- the life of an evaluation --------------------------------------------------------------------------------------------


def test_every_state_is_in_the_table_and_is_either_terminal_or_active() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set(State) == TERMINAL_STATES | ACTIVE_STATES
    assert not TERMINAL_STATES & ACTIVE_STATES
    assert HELD_STATES < ACTIVE_STATES
    assert {state for state in State if state.terminal} == TERMINAL_STATES


def test_nothing_follows_a_terminal_state() -> None:
    for state, target in product(TERMINAL_STATES, State):
        assert not TRANSITIONS[state]
        with pytest.raises(TransitionError, match="nothing: it is final"):
            check_transition(state, target, next(iter(Reason)))


def test_every_other_state_can_still_be_cancelled_and_fail() -> None:
    assert all({State.CANCELLED, State.FAILED} <= TRANSITIONS[state] for state in ACTIVE_STATES)


@given(st.data())
def test_every_walk_through_the_table_can_end_and_then_stays_there(data: st.DataObject) -> None:
    state = State.SUBMITTED
    for _ in range(12):
        if state.terminal:
            break
        state = data.draw(st.sampled_from(sorted(TRANSITIONS[state])))
    assert state.terminal or TRANSITIONS[state] & TERMINAL_STATES
    assert state is not State.SUBMITTED


def test_completing_takes_a_run() -> None:
    assert {state for state, targets in TRANSITIONS.items() if State.COMPLETED in targets} == {State.RUNNING}


def test_only_what_is_held_goes_back_to_the_queue() -> None:
    back = {state for state, targets in TRANSITIONS.items() if State.QUEUED in targets} - {State.SUBMITTED}
    assert back == HELD_STATES


def test_each_reason_belongs_to_exactly_one_terminal_state() -> None:
    for reason in Reason:
        homes = [state for state, reasons in TERMINAL_REASONS.items() if reason in reasons]
        assert homes == [terminal_state_of(reason)]
        assert homes[0].terminal


def test_what_may_be_tried_again_is_a_failure_and_never_the_codes_own() -> None:
    assert TERMINAL_REASONS[State.FAILED] > RETRYABLE_REASONS
    assert not RETRYABLE_REASONS & {Reason.EXCEPTION, Reason.EXIT_NONZERO, Reason.OOM_KILLED, Reason.SIGNAL}


@given(st.sampled_from(State), st.sampled_from(State), st.sampled_from([None, *Reason]))
def test_a_step_is_accepted_exactly_if_the_table_has_it_and_the_reason_fits(
    current: State, target: State, reason: Reason | None
) -> None:
    possible = target in TRANSITIONS[current]
    fitting = not target.terminal or (reason is not None and terminal_state_of(reason) is target)
    if possible and fitting:
        check_transition(current, target, reason)
    else:
        with pytest.raises(TransitionError, match=target):
            check_transition(current, target, reason)


# --- requests -------------------------------------------------------------------------------------------------------------

# Text as hostile as Python has it: NUL, lone surrogates, right-to-left overrides, everything.
_ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
_ANY_INT = st.none() | st.integers() | st.just(10**5000)
_SOME_QUANTITY = st.none() | st.sampled_from(["1", "500m", "64Mi", "1Gi", "0.5", "9Ei", "-1", "NaN"]) | _ANY_TEXT
REQUESTS = st.builds(
    EvaluationRequest,
    code=_ANY_TEXT | st.sampled_from(["print(1)", "", " \n", "\x00", "\u202e" * 3]),
    stdin=_ANY_TEXT,
    priority=_ANY_INT,
    timeout_seconds=_ANY_INT,
    queue_timeout_seconds=_ANY_INT,
    profile=st.none() | st.sampled_from(["small", "large", ""]) | _ANY_TEXT,
    memory_limit=_SOME_QUANTITY,
    cpu_limit=_SOME_QUANTITY,
    image=st.none() | st.just("python") | _ANY_TEXT,
    labels=st.dictionaries(_ANY_TEXT | st.text(string.ascii_letters, max_size=5), _ANY_TEXT, max_size=20),
)


def spec_or_violations(request: EvaluationRequest) -> EvaluationSpec | list[Violation]:
    try:
        return resolve(request, LIMITS)
    except RequestRejectedError as error:
        return error.violations


@given(REQUESTS)
def test_a_request_is_resolved_within_the_limits_or_refused_with_what_would_do(request: EvaluationRequest) -> None:
    spec = spec_or_violations(request)
    if isinstance(spec, list):
        assert spec
        assert all(violation.accepted and violation.message for violation in spec)
        assert {violation.field for violation in spec} <= set(EvaluationRequest.model_fields)
        return
    assert PRIORITY_MIN <= spec.priority <= PRIORITY_MAX
    assert LIMITS.timeout_min_s <= spec.timeout_seconds <= LIMITS.timeout_max_s
    assert spec.queue_timeout_seconds is None or 1 <= spec.queue_timeout_seconds <= LIMITS.queue_timeout_max_s
    assert LIMITS.cpu_min_millis <= spec.resources.cpu_millis <= LIMITS.cpu_max_millis
    assert LIMITS.memory_min_bytes <= spec.resources.memory_bytes <= LIMITS.memory_max_bytes
    assert 0 < len(spec.code.encode()) <= LIMITS.code_bytes
    assert len(spec.stdin.encode()) <= LIMITS.stdin_bytes
    assert "\x00" not in spec.code + spec.stdin
    assert spec.image in LIMITS.images
    assert len(spec.labels) <= LIMITS.label_count
    assert spec.size_class is LIMITS.size_class(spec.resources.memory_bytes)


def test_what_a_request_leaves_out_is_filled_in_from_the_limits() -> None:
    spec = accept()
    assert (spec.priority, spec.timeout_seconds) == (LIMITS.priority_default, LIMITS.timeout_default_s)
    assert spec.resources.memory_bytes == LIMITS.profiles[LIMITS.profile_default].memory_bytes
    assert (spec.size_class, spec.image, spec.queue_timeout_seconds) == (SizeClass.SMALL, "python", None)


def test_every_broken_rule_is_reported_at_once() -> None:
    assert refuse(
        code="\x00",
        stdin="\ud800",
        priority=11,
        timeout_seconds=0,
        queue_timeout_seconds=0,
        profile="huge",
        memory_limit="1Ti",
        cpu_limit="lots",
        image="perl",
        labels={"-": "ok"},
    ).keys() == {
        "code",
        "stdin",
        "priority",
        "timeout_seconds",
        "queue_timeout_seconds",
        "profile",
        "memory_limit",
        "cpu_limit",
        "image",
        "labels",
    }


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"priority": 11}, "priority", "0 to 10"),
    ({"priority": -1}, "priority", "0 to 10"),
    ({"priority": 10**5000}, "priority", "0 to 10"),
    ({"timeout_seconds": 3601}, "timeout_seconds", "1 to 3600"),
    ({"timeout_seconds": 0}, "timeout_seconds", "1 to 3600"),
    ({"memory_limit": "9Gi"}, "memory_limit", "32Mi to 8Gi"),
    ({"memory_limit": "1Mi"}, "memory_limit", "32Mi to 8Gi"),
    ({"memory_limit": "much"}, "memory_limit", '"256Mi" or "1Gi"'),
    ({"cpu_limit": "5"}, "cpu_limit", "10m to 4"),
    ({"cpu_limit": "1m"}, "cpu_limit", "10m to 4"),
    ({"profile": ""}, "profile", "small, medium, large"),
    ({"image": ""}, "image", "python"),
    ({"code": " \n\t"}, "code", "Python source"),
    ({"code": "x" * (MIB + 1)}, "code", f"at most {MIB} bytes of UTF-8"),
    ({"code": "é" * (MIB // 2 + 1)}, "code", f"at most {MIB} bytes of UTF-8"),
    ({"stdin": "\x00"}, "stdin", "valid UTF-8 text without NUL"),
    ({"labels": {f"l{n}": "" for n in range(17)}}, "labels", "at most 16"),
]


def test_a_refusal_names_the_field_and_what_would_be_accepted() -> None:
    for fields, field, accepted in REFUSED:
        assert refuse(**fields) == {field: accepted}


def test_free_kubernetes_label_keys_are_accepted() -> None:
    for key in ["a", "app", "example.org/app", "a.b-c.d/Name_1.x", "x" * 63, "my-kubernetes.io/a"]:
        assert accept(labels={key: "v"}).labels == {key: "v"}


TAKEN_OR_MALFORMED = [
    "",
    "-a",
    "a-",
    "/a",
    "a/",
    "a/b/c",
    "A.org/x",
    "a..b/x",
    "a.-b/x",
    "x" * 64,
    f"{'a.' * 127}a/x",
    "a\n",
    "é",
    "crucible.dev/x",
    "x.crucible.dev/x",
    "kubernetes.io/os",
    "app.kubernetes.io/name",
    "node.k8s.io/x",
]


def test_other_label_keys_are_refused() -> None:
    for key in TAKEN_OR_MALFORMED:
        assert refuse(labels={key: "v"}).keys() == {"labels"}, key


def test_a_hundred_thousand_labels_make_no_more_violations_than_labels_are_allowed() -> None:
    with pytest.raises(RequestRejectedError) as refused:
        accept(labels={f"-{n}": "-" for n in range(100_000)})
    assert len(refused.value.violations) <= 1 + 2 * LIMITS.label_count


def test_explicit_limits_override_parts_of_a_profile() -> None:
    spec = accept(profile="large", cpu_limit="250m")
    assert (spec.resources.cpu_millis, spec.resources.memory_bytes) == (250, 2 * GIB)


def test_the_size_class_follows_from_memory() -> None:
    expected = {
        32 * MIB: SizeClass.SMALL,
        256 * MIB: SizeClass.SMALL,
        256 * MIB + 1: SizeClass.MEDIUM,
        GIB - 1: SizeClass.MEDIUM,
        GIB: SizeClass.LARGE,
        8 * GIB: SizeClass.LARGE,
    }
    assert {memory: accept(memory_limit=str(memory)).size_class for memory in expected} == expected


def test_numbers_are_not_guessed_from_other_types() -> None:
    fields = ["priority", "timeout_seconds", "queue_timeout_seconds"]
    for field, value in product(fields, ["5", 5.0, True, [], {}]):
        with pytest.raises(ValidationError):
            EvaluationRequest.model_validate({"code": "pass", field: value})


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="timeout"):
        EvaluationRequest.model_validate({"code": "pass", "timeout": 5})


def test_text_that_cannot_be_stored_is_told_with_its_place() -> None:
    for text, offset in [("ab\x00", 2), ("\ud800", 0), ("a\udfff", 1)]:
        assert f"at offset {offset}" in (text_problem(text) or "")


def test_other_text_is_left_alone() -> None:
    for text in ["", "مرحبا", "\u202eabc", "\U0001f600", "\x1b[31m", "\ufeff"]:
        assert text_problem(text) is None


# --- limits ---------------------------------------------------------------------------------------------------------------


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"timeout_max_s": 30}, "timeout_default_s"),
    ({"timeout_min_s": 90}, "timeout_default_s"),
    ({"cpu_min_millis": 5000}, "cpu_max_millis"),
    ({"memory_min_bytes": 9 * GIB}, "memory_max_bytes"),
    ({"medium_from_bytes": 2 * GIB}, "large_from_bytes"),
    ({"inline_output_bytes": GIB}, "output_bytes"),
    ({"code_bytes": 9 * MIB}, "body_bytes"),
    ({"batch_body_bytes": MIB}, "batch_body_bytes"),
    ({"profile_default": "tiny"}, "profile_default"),
    ({"memory_max_bytes": GIB}, "profiles.large"),
    ({"cpu_max_millis": 300}, "profiles.medium"),
    ({"profiles": {"small": {"cpu_millis": 250, "memory_bytes": MIB}}}, "profiles.small"),
]


def test_limits_that_contradict_each_other_are_refused_by_name() -> None:
    for fields, named in CONTRADICTIONS:
        with pytest.raises(ValidationError, match=named):
            Limits.model_validate(fields)


def test_tightened_limits_bind_requests() -> None:
    limits = Limits(
        memory_max_bytes=128 * MIB, profiles={"small": Profile(cpu_millis=100, memory_bytes=64 * MIB)}, code_bytes=10
    )
    assert accept(limits).resources.memory_bytes == 64 * MIB
    assert refuse(limits, memory_limit="256Mi", code="x" * 11).keys() == {"memory_limit", "code"}


def test_code_and_standard_input_of_the_largest_size_fit_into_a_body_however_they_are_escaped() -> None:
    # Three times is the worst for text: a two-byte character as \uXXXX.
    assert 3 * (LIMITS.code_bytes + LIMITS.stdin_bytes) < LIMITS.body_bytes
