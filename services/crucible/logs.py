"""Structured logs: one JSON object a line on standard error, or coloured lines on a terminal.

Every record has service, time, level and, where there is one, trace id and evaluation id (both bound through context variables,
so that they follow a request through `await`). Secrets and people's code never reach a log: keys that hold them are replaced
before rendering, whatever the caller passed.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any

import orjson
import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from crucible.settings import LogSettings

_HIDDEN_KEYS = frozenset(
    {"code", "stdin", "authorization", "api_key", "key", "secret", "token", "password", "cookie", "database_url"}
)
_HIDDEN_SUFFIXES = ("_token", "_secret", "_password", "_key")
_NAMES_ONLY = frozenset({"idempotency_key", "key_id"})
# A URL's password, and our own API keys, wherever they stand in a text.
_SECRET_TEXT = re.compile(r"(?P<scheme>\w+://[^\s:/@]*:)[^\s@/]+@|(?P<key>crk_[0-9a-z]{8}_)[A-Za-z0-9_-]+")
REDACTED = "[redacted]"


def _clean_text(text: str) -> str:
    return _SECRET_TEXT.sub(lambda m: f"{m['scheme']}{REDACTED}@" if m["scheme"] else f"{m['key']}{REDACTED}", text)


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace whatever may hold a secret or a person's code; a structlog processor."""
    for key, value in event.items():
        lowered = key.lower()
        if lowered not in _NAMES_ONLY and (lowered in _HIDDEN_KEYS or lowered.endswith(_HIDDEN_SUFFIXES)):
            event[key] = REDACTED
        elif isinstance(value, str):
            event[key] = _clean_text(value)
    return event


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
        else structlog.processors.JSONRenderer(serializer=lambda value, **_: orjson.dumps(value, default=str).decode())
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
    root.setLevel(max(level, logging.WARNING))


def get_logger(part: str) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose records carry `part`, the component that speaks."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=part)
    return logger
