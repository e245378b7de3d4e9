"""Reading request bodies: bounded while they arrive, strictly JSON, and refused in words rather than by accident.

Python's own parser is used, since it can see what faster ones hide: a member given twice, NaN, and escapes that stand for half
a character. Everything that arrives here may be hostile.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from crucible.evaluation import Violation, text_problem
from crucible.problems import ProblemError, invalid_request
from crucible.service import violations_of

if TYPE_CHECKING:
    from starlette.requests import Request

M = TypeVar("M", bound=BaseModel)

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
# A full batch has some 3,000; a body of four million empty members would cost its reader far more than its sender.
_MEMBERS_MAX = 20_000
_FIELD_SHOWN = 200


class Json:
    """A parsed body. `suspect` says that some text may hold half a surrogate pair, which has no UTF-8 form."""

    def __init__(self, value: Any, *, suspect: bool) -> None:
        self.value = value
        self.suspect = suspect


def _malformed(detail: str) -> ProblemError:
    return ProblemError("malformed-json", detail)


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ProblemError("unsupported-media-type", f"the body is {kind[:80]!a}, not application/json")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ProblemError("unsupported-media-type", f"a body with Content-Encoding {coding[:80]!a} is not read")


def _too_large(limit: int) -> ProblemError:
    # The connection stays open: the server discards the rest, so that a client that is still sending finds the answer
    # and not a broken pipe.
    return ProblemError("body-too-large", f"the body is larger than {limit} bytes", limit=limit)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body, refusing it as soon as it is longer than `limit` bytes, whatever its Content-Length says.

    Raises:
        ProblemError: 413 or 415.
    """
    _check_headers(request)
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


class _Members:
    """Builds objects, counting members over the whole body and refusing one that is given twice."""

    def __init__(self) -> None:
        self._seen = 0

    def build(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._seen += len(pairs)
        if self._seen > _MEMBERS_MAX:
            raise _malformed(f"the body has more than {_MEMBERS_MAX} members")
        built = dict(pairs)
        if len(built) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _malformed(f"the member {twice[:80]!a} is given more than once")
        return built


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not JSON")


def parse_json(body: bytes) -> Json:
    """Parse a body.

    Raises:
        ProblemError: 400, saying what is wrong and where.
    """
    if not body:
        raise _malformed("the body is empty")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not UTF-8: byte {error.start} is not part of a character") from error
    try:
        value = json.loads(text, object_pairs_hook=_Members().build, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise _malformed("the body is nested too deeply") from error
    except ValueError as error:
        # Python refuses to read integers of more than 4300 digits.
        raise _malformed("a number in the body has too many digits") from error
    return Json(value, suspect=_SURROGATE_ESCAPE.search(body) is not None)


def _broken_texts(value: Any) -> list[Violation]:
    found: list[Violation] = []
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, str):
            problem = text_problem(item) if not item.isascii() else None
            if problem:
                found.append(Violation(field=path or "body", message=problem, accepted="valid UTF-8 text"))
        elif isinstance(item, dict):
            for name, inner in item.items():
                inner_path = f"{path}.{ascii(name)[1:-1]}".lstrip(".")[:_FIELD_SHOWN]
                pending.append((inner_path, inner))
                if not name.isascii():
                    pending.append((inner_path, name))
        elif isinstance(item, list):
            pending.extend((f"{path}.{index}".lstrip("."), inner) for index, inner in enumerate(item))
    return sorted(found, key=lambda violation: violation.field)[:50]


def validate(model: type[M], value: Any, *, suspect: bool) -> M:
    """Hold a parsed value against a model.

    Raises:
        ProblemError: 400 if it is not an object, 422 with every violation otherwise.
    """
    if not isinstance(value, dict):
        raise _malformed("a JSON object is expected")
    if suspect and (broken := _broken_texts(value)):
        raise ProblemError("invalid-request", "the request holds text that has no UTF-8 form", violations=broken)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        violations = violations_of(error.errors(include_url=False))
        raise invalid_request(violations) from error


async def read_model(request: Request, model: type[M], limit: int) -> M:
    """Read, parse and validate a body of at most `limit` bytes."""
    parsed = parse_json(await read_body(request, limit))
    return validate(model, parsed.value, suspect=parsed.suspect)
