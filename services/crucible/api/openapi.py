"""The OpenAPI document as a contract: the canonical form that is kept in the repository, and what breaks its readers.

The document is built from the real app, with nothing behind it. It does not depend on an installation's settings: limits that
may differ are read from `/v1/limits`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from crucible.api.app import make_api_app
from crucible.api.core import Api
from crucible.clients import DispatcherClient, StorageClient
from crucible.events import InProcessBus
from crucible.limits import Limits
from crucible.settings import ApiSettings, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

Schema = dict[str, Any]

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


def _unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("the document is built without any service", request=request)


def canonical_spec() -> dict[str, Any]:
    """Return the OpenAPI document of the real app, every object sorted by its keys."""
    http = httpx.AsyncClient(transport=httpx.MockTransport(_unreachable), base_url="http://nowhere")
    settings = Settings(limits=Limits(), api=ApiSettings())
    return make_api_app(Api(settings, StorageClient(http), DispatcherClient(http), InProcessBus())).openapi()


def breaking_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what would break a client written against `old` when it meets `new`, in words; empty if nothing would.

    What a client sends may become freer, what it receives may become more: everything else is breaking.
    """
    return list(dict.fromkeys(_Comparison(old, new).all()))


def _resolve(spec: dict[str, Any], schema: Schema) -> Schema:
    seen = 0
    while "$ref" in schema and seen < 20:
        node: Any = spec
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part.replace("~1", "/").replace("~0", "~")]
        schema, seen = node, seen + 1
    return schema


def _types(spec: dict[str, Any], schema: Schema) -> set[str]:
    """Return the JSON types that a schema allows; empty if it does not say."""
    schema = _resolve(spec, schema)
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return set().union(*(_types(spec, branch) for branch in branches))
    if "type" in schema:
        kind = schema["type"]
        return set(kind) if isinstance(kind, list) else {kind}
    if "const" in schema or "enum" in schema:
        return {"string"}
    return set()


def _branches(spec: dict[str, Any], schema: Schema) -> list[Schema]:
    """Return the alternatives of a schema that are not null."""
    schema = _resolve(spec, schema)
    found = [_resolve(spec, branch) for branch in schema.get("anyOf") or schema.get("oneOf") or [schema]]
    return [branch for branch in found if branch.get("type") != "null"]


def _values(schema: Schema) -> set[str] | None:
    if "const" in schema:
        return {str(schema["const"])}
    return {str(value) for value in schema["enum"]} if "enum" in schema else None


class _Comparison:
    """Two documents side by side. `sent` is True for what the client sends, False for what it receives."""

    def __init__(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        self._old = old
        self._new = new
        self._compared: set[tuple[str, str, bool]] = set()

    def all(self) -> Iterator[str]:
        for path, item in sorted(self._old.get("paths", {}).items()):
            if path not in self._new.get("paths", {}):
                yield f"{path}: removed"
                continue
            for method in _METHODS:
                if method in item:
                    yield from self._operation(
                        f"{method.upper()} {path}", item[method], self._new["paths"][path].get(method)
                    )

    def _operation(self, where: str, old: Schema, new: Schema | None) -> Iterator[str]:
        if new is None:
            yield f"{where}: removed"
            return
        if new.get("security") and not old.get("security"):
            yield f"{where}: needs a key now"
        yield from self._parameters(where, old, new)
        yield from self._request_body(where, old.get("requestBody"), new.get("requestBody"))
        yield from self._responses(where, old.get("responses", {}), new.get("responses", {}))

    def _parameters(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        before = {(p["in"], p["name"].lower()): p for p in old.get("parameters", [])}
        after = {(p["in"], p["name"].lower()): p for p in new.get("parameters", [])}
        for key, parameter in sorted(before.items()):
            name = f"{where}: {key[0]} parameter {parameter['name']}"
            if key not in after:
                yield f"{name}: removed"
                continue
            if after[key].get("required") and not parameter.get("required"):
                yield f"{name}: required now"
            yield from self._schema(name, parameter.get("schema", {}), after[key].get("schema", {}), sent=True)
        for key, parameter in sorted(after.items()):
            if key not in before and parameter.get("required"):
                yield f"{where}: {key[0]} parameter {parameter['name']}: new and required"

    def _request_body(self, where: str, old: Schema | None, new: Schema | None) -> Iterator[str]:
        if old is None:
            if new is not None and new.get("required"):
                yield f"{where}: body: new and required"
            return
        if new is None:
            yield f"{where}: body: removed"
            return
        if new.get("required") and not old.get("required"):
            yield f"{where}: body: required now"
        yield from self._content(f"{where}: body", old, new, sent=True)

    def _responses(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        for status, answer in sorted(old.items()):
            # Clients may count on how they succeed; which errors they may meet is free to change.
            if not status.startswith("2"):
                continue
            if status not in new:
                yield f"{where}: answer {status}: removed"
                continue
            yield from self._content(f"{where}: answer {status}", answer, new[status], sent=False)
            for header in sorted(answer.get("headers", {})):
                if header not in new[status].get("headers", {}):
                    yield f"{where}: answer {status}: header {header}: removed"

    def _content(self, where: str, old: Schema, new: Schema, *, sent: bool) -> Iterator[str]:
        after = new.get("content", {})
        for kind, content in sorted(old.get("content", {}).items()):
            if kind not in after:
                yield f"{where}: {kind}: removed"
                continue
            yield from self._schema(where, content.get("schema", {}), after[kind].get("schema", {}), sent=sent)

    def _schema(self, where: str, old: Schema, new: Schema, *, sent: bool) -> Iterator[str]:
        # A model that refers to itself, or that many places share, is compared once in each direction.
        if "$ref" in old and "$ref" in new:
            pair = (old["$ref"], new["$ref"], sent)
            if pair in self._compared:
                return
            self._compared.add(pair)
        yield from self._type(where, old, new, sent=sent)
        before, after = _branches(self._old, old), _branches(self._new, new)
        # Alternatives are matched by their place; a different number of them shows as a change of type.
        for left, right in zip(before, after, strict=False):
            yield from self._values_of(where, left, right, sent=sent)
            yield from self._bounds(where, left, right, sent=sent)
            yield from self._fields(where, left, right, sent=sent)
            for part in ("items", "additionalProperties"):
                if isinstance(left.get(part), dict) and isinstance(right.get(part), dict):
                    yield from self._schema(f"{where}[]", left[part], right[part], sent=sent)

    def _type(self, where: str, old: Schema, new: Schema, *, sent: bool) -> Iterator[str]:
        before, after = _types(self._old, old), _types(self._new, new)
        if not before and not after:
            return
        # An integer is a number: sending one where numbers are taken, and receiving one where they are expected, is fine.
        wider, narrower = (after, before) if sent else (before, after)
        missing = narrower - wider - ({"integer"} if "number" in wider else set())
        if (wider and not narrower) or (narrower and wider and missing):
            yield f"{where}: type changed from {_words(before)} to {_words(after)}"

    def _values_of(self, where: str, old: Schema, new: Schema, *, sent: bool) -> Iterator[str]:
        before, after = _values(old), _values(new)
        if sent and after is not None:
            gone = (before or set()) - after
            if before is None:
                yield f"{where}: only some values are accepted now: {', '.join(sorted(after))}"
            elif gone:
                yield f"{where}: no longer accepts {', '.join(sorted(gone))}"
        if not sent and before is not None and after is None:
            yield f"{where}: values are no longer limited to {', '.join(sorted(before))}"

    def _bounds(self, where: str, old: Schema, new: Schema, *, sent: bool) -> Iterator[str]:
        if not sent:
            return
        for bound in ("maximum", "maxLength", "maxItems"):
            if bound in new and new[bound] < old.get(bound, float("inf")):
                yield f"{where}: {bound} lowered to {new[bound]}"
        for bound in ("minimum", "minLength", "minItems"):
            if bound in new and new[bound] > old.get(bound, float("-inf")):
                yield f"{where}: {bound} raised to {new[bound]}"
        if "pattern" in new and new["pattern"] != old.get("pattern"):
            yield f"{where}: pattern changed to {new['pattern']}"

    def _fields(self, where: str, old: Schema, new: Schema, *, sent: bool) -> Iterator[str]:
        before, after = old.get("properties", {}), new.get("properties", {})
        needed_before, needed_after = set(old.get("required", [])), set(new.get("required", []))
        for name, schema in sorted(before.items()):
            if name not in after:
                yield f"{where}: field {name}: removed"
                continue
            if sent and name in needed_after - needed_before:
                yield f"{where}: field {name}: required now"
            if not sent and name in needed_before - needed_after:
                yield f"{where}: field {name}: may be absent now"
            yield from self._schema(f"{where}: field {name}", schema, after[name], sent=sent)
        if sent:
            for name in sorted(needed_after - set(before)):
                yield f"{where}: field {name}: new and required"


def _words(types: set[str]) -> str:
    return " or ".join(sorted(types)) or "anything"
