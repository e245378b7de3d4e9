"""Structured logs: one JSON object a line on standard error, or coloured lines on a terminal.

Every record has service, time, level and, where there is one, trace id and evaluation id (both bound through context variables,
so that they follow a request through `await`). Secrets and people's code never reach a log: what holds them is replaced before
rendering, by name at any depth and by shape in any text, whatever the caller passed. Servers that bring loggers of their own
(uvicorn) are to be started without a log configuration; their records then come out here.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from pydantic import BaseModel, SecretStr

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from crucible.settings import LogSettings

REDACTED = "[redacted]"
_HIDDEN_KEYS = frozenset(
    {
        "api_key",
        "authorization",
        "code",
        "cookie",
        "credentials",
        "database_url",
        "key",
        "passwd",
        "password",
        "proxy_authorization",
        "secret",
        "set_cookie",
        "source",
        "stderr",
        "stdin",
        "stdout",
        "token",
    }
)
_HIDDEN_SUFFIXES = ("_token", "_secret", "_password", "_key", "_credentials")
_NAMES_ONLY = frozenset({"idempotency_key", "object_key"})
_SENSITIVE_WORDS = r"passw(?:or)?d|pwd|secret|token|api[_-]?key|access[_-]?key|signature|credential"
# Each finds what follows its group `keep`; that group stays, so that a reader sees what was there. Repetitions that can begin anywhere are
# bounded, lest a long text take quadratic time.
_SECRET_SHAPES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        # A URL's password, up to the last @ before the path.
        r"(?P<keep>\w{1,20}://[^\s:/@]*:)[^\s/]+(?=@)",
        # Our own API keys.
        r"(?P<keep>crk_[0-9a-z]{8}_)[A-Za-z0-9_-]+",
        # Credentials of an HTTP header.
        r"(?P<keep>\b(?i:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}",
        # JSON Web Tokens.
        r"(?P<keep>\beyJ)[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?",
        # name=value and "name": "value", as in query strings, connection strings and printed mappings.
        rf"(?P<keep>\b(?i:[\w-]{{0,40}}(?:{_SENSITIVE_WORDS})[\w-]{{0,40}})[\"']?\s*[=:]\s*[bru]{{0,2}}[\"']?)(?!\[redacted\])[^\s\"'&,;)}}\]]+",
        r"(?P<keep>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)",
        # Where errors quote what they choke on, that may be a person's code: pydantic's input, a statement's parameters, the
        # row that PostgreSQL refuses.
        r"(?P<keep>\binput_value=).*?(?=, input_type=|\Z)",
        r"(?P<keep>\[parameters: ).*?(?=\]\n|\]\Z|\Z)",
        r"(?P<keep>\bFailing row contains \().*?(?=\)\.?(?:\n|\Z)|\Z)",
    )
)
# Nothing worth logging is nested deeper; what is, is named and not shown, which also ends cycles.
_MAX_DEPTH = 6
# A traceback fits; a source text or an output need not.
_MAX_CHARACTERS = 16_384


def _clean_text(text: str) -> str:
    kept, more = text[:_MAX_CHARACTERS], len(text) - _MAX_CHARACTERS
    for shape in _SECRET_SHAPES:
        kept = shape.sub(rf"\g<keep>{REDACTED}", kept)
    return f"{kept} [... {more} characters more]" if more > 0 else kept


def _hides(name: str) -> bool:
    lowered = name.lower().replace("-", "_")
    return lowered not in _NAMES_ONLY and (lowered in _HIDDEN_KEYS or lowered.endswith(_HIDDEN_SUFFIXES))


def _name(key: object) -> str:
    return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)


def _clean_mapping(mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    return {
        _clean_text(name): REDACTED if _hides(name) else _clean(value, depth + 1)
        for name, value in ((_name(key), value) for key, value in mapping.items())
    }


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Return what a mapping-like value holds, or None if it is not one."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, BaseModel):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _clean_container(value: Any, depth: int) -> Any:
    if depth >= _MAX_DEPTH:
        return f"<{type(value).__name__}>"
    fields = _fields(value)
    if fields is not None:
        return _clean_mapping(fields, depth)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], (str, bytes)) and _hides(_name(value[0])):
        # A header, as ASGI and httpx keep them.
        return [_name(value[0]), REDACTED]
    if isinstance(value, (list, tuple, Set)):
        return [_clean(item, depth + 1) for item in value]
    return _clean_text(f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value))


def _clean(value: Any, depth: int) -> Any:
    """Return a value that renders as JSON and holds no secret."""
    match value:
        case None | bool() | float():
            return value
        case int():
            # Larger integers have no place in JSON's usual readers, nor in orjson.
            return value if value.bit_length() < 64 else f"<integer of {value.bit_length()} bits>"
        case str():
            return _clean_text(value)
        case bytes() | bytearray():
            return _clean_text(bytes(value[: _MAX_CHARACTERS + 1]).decode("utf-8", "backslashreplace"))
        case SecretStr():
            return REDACTED
    return _clean_container(value, depth)


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace whatever may hold a secret or a person's code, at any depth; a structlog processor."""
    # What begins with an underscore is structlog's own and is taken out before rendering.
    own = {name: value for name, value in event.items() if name.startswith("_")}
    return own | _clean_mapping({name: value for name, value in event.items() if name not in own}, -1)


def speakable(value: Any) -> Any:
    """Return a value without what has no UTF-8 form (lone surrogates), which a line of JSON cannot hold."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {speakable(name): speakable(member) for name, member in value.items()}
        case list():
            return [speakable(member) for member in value]
    return value


def _to_json(event: Any, **_: Any) -> str:
    try:
        return orjson.dumps(event, default=str).decode()
    except orjson.JSONEncodeError:
        return orjson.dumps(speakable(event), default=str).decode()


def configure(service: str, settings: LogSettings) -> None:
    """Set up logging for this process. `service` names it in every record. Standard-library loggers go the same way."""
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())

    def name_service(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("service", service)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        name_service,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(timestamp_key="time")
        if console
        else structlog.processors.JSONRenderer(serializer=_to_json)
    )
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries speak up from WARNING on: below it they tell of every request and statement, with what was in them.
    root.setLevel(max(level, logging.WARNING))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        server = logging.getLogger(name)
        server.handlers, server.propagate = [], True


def get_logger(part: str) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose records carry `part`, the component that speaks."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=part)
    return logger
