"""Writes docs/stack-configuration.md: every key of a stack's configuration, as the models that check it have it. It says nothing of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from crucible_platform.place import PREFIX
from crucible_platform.stack import (
    EXAMPLE_FILE,
    ORGANISATION_FILE,
    ORGANISATION_VARIABLE,
    CloudConfig,
    LocalConfig,
    Organisation,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


Schema = dict[str, Any]

_HEAD = f"""\
# Stack configuration

<!-- Written by `crucible-platform config-docs`; do not edit. -->

`Pulumi.<stack>.yaml` holds what an environment is like, and `{ORGANISATION_FILE}` what is your organisation's own. The first is tracked and complete; the
second is not, and begins as a copy of `{EXAMPLE_FILE}` (`{ORGANISATION_VARIABLE}` names another file). An unknown key, a missing one and a value that cannot be used
are errors that name the key, before any resource is made or changed."""
_COLUMNS = ("key", "type", "default", "bounds", "meaning")
_BOUNDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "above {}",
    "exclusiveMaximum": "below {}",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "minProperties": "at least {} entries",
    "pattern": "matches `{}`",
}
_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "ipv4network": "network",
}


def reference() -> str:
    """Return the page."""
    parts = [_HEAD]
    for title, model, prefix in (
        (f"`{ORGANISATION_FILE}`", Organisation, ""),
        ("`Pulumi.<stack>.yaml` of an environment on AWS", CloudConfig, f"{PREFIX}:"),
        ("`Pulumi.local.yaml`", LocalConfig, f"{PREFIX}:"),
    ):
        schema = model.model_json_schema(mode="validation")
        rows = list(_rows(schema, schema.get("$defs", {}), prefix))
        parts += [f"## {title}", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _rows(schema: Schema, shared: dict[str, Schema], path: str) -> Iterator[tuple[str, ...]]:
    required = schema.get("required", [])
    for name, found in schema["properties"].items():
        said = _resolved(found, shared)
        key = f"{path}{name}"
        additional = said.get("additionalProperties")
        entry = _resolved(additional if isinstance(additional, dict) else {}, shared)
        options = [_resolved(each, shared) for each in said.get("anyOf", [])]
        if optional := next((each for each in options if "properties" in each), None):
            yield (f"`{key}`", "a section", "unset", "", said.get("description", ""))
            yield from _rows(optional, shared, f"{key}.")
        elif "properties" in said:
            yield from _rows(said, shared, f"{key}.")
        elif "properties" in entry:
            yield (f"`{key}`", "one section for each", "required", _bounds(said, shared), said.get("description", ""))
            yield from _rows(entry, shared, f"{key}.<name>.")
        else:
            default = "required" if name in required else _value(said.get("default"))
            yield (f"`{key}`", _kind(said, shared), default, _bounds(said, shared), said.get("description", ""))


def _resolved(schema: Schema, shared: dict[str, Schema]) -> Schema:
    """Return what a schema refers to, with what it adds itself."""
    reference = schema.get("$ref")
    if not reference:
        [only] = schema["allOf"] if len(schema.get("allOf", [])) == 1 else [{}]
        return {**_resolved(only, shared), **schema} if only else schema
    return {
        **_resolved(shared[reference.rpartition("/")[2]], shared),
        **{k: v for k, v in schema.items() if k != "$ref"},
    }


def _kind(schema: Schema, shared: dict[str, Schema]) -> str:
    if "anyOf" in schema:
        return " or ".join(
            _kind(_resolved(each, shared), shared) for each in schema["anyOf"] if each.get("type") != "null"
        )
    if "enum" in schema:
        return "one of " + ", ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list: {_kind(_resolved(schema.get('items', {}), shared), shared)}"
    if schema.get("type") == "object":
        return f"by name: {_kind(_resolved(schema.get('additionalProperties') or {}, shared), shared)}"
    return _KINDS[schema.get("format") or schema["type"]]


def _bounds(schema: Schema, shared: dict[str, Schema]) -> str:
    inner = _resolved(schema.get("items") or {}, shared)
    said = [words.format(schema[key]) for key, words in _BOUNDS.items() if key in schema]
    return "; ".join([*said, *(f"each {words.format(inner[key])}" for key, words in _BOUNDS.items() if key in inner)])


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    text = json.dumps(sorted(value) if isinstance(value, list) else value)
    return f"`{text}`"


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
