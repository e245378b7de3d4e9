"""The API's documentation as one page, made from the OpenAPI document.

It has no script and loads nothing: it works without the internet, and nothing that a third party serves runs where API keys are
used. It shows; for trying requests there is curl (docs/api-tour.md) and any OpenAPI tool, which finds `/openapi.json`.
"""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Styles are inline, and that is all there is.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_CODE = re.compile(r"`([^`]+)`")


def render(spec: dict[str, Any]) -> str:
    """Return the page."""
    style = files("crucible.api").joinpath("page.css").read_text()
    info = spec["info"]
    body = "\n".join(
        [
            f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>",
            _prose(info["description"]),
            '<p><a href="/openapi.json">The OpenAPI document</a></p>',
            *_operations(spec),
            "<h2>Schemas</h2>",
            *(_schema(name, schema) for name, schema in spec["components"]["schemas"].items()),
        ]
    )
    title = escape(info["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title} API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style><body>{body}</body></html>'
    )


def _text(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))


def _prose(text: str) -> str:
    return "".join(f"<p>{_text(paragraph)}</p>" for paragraph in text.strip().split("\n\n"))


def _table(caption: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """Return rows of name, kind and text; the kind is HTML already."""
    body = "".join(
        f"<tr><th><code>{escape(name)}</code></th><td>{kind}</td><td>{_text(text)}</td></tr>"
        for name, kind, text in rows
    )
    return f"<table><caption>{escape(caption)}</caption>{body}</table>" if body else ""


def _kind(schema: dict[str, Any]) -> str:
    """Return the type of a schema in short, with links to those that have a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if alternatives := schema.get("anyOf"):
        return " or ".join(_kind(one) for one in alternatives)
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if "enum" in schema:
        return " ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "up to"), ("exclusiveMinimum", "above"))
        if key in schema
    ]
    return escape(" ".join([schema.get("format") or schema.get("type", "any"), *bounds]))


def _operations(spec: dict[str, Any]) -> Iterator[str]:
    for tag in spec["tags"]:
        yield f"<h2>{escape(tag['name'].capitalize())}</h2><p>{_text(tag['description'])}</p>"
        for path, item in spec["paths"].items():
            for method, operation in item.items():
                if tag["name"] in operation["tags"]:
                    yield _operation(method, path, operation)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = (
        (
            parameter["name"],
            f"{escape(parameter['in'])}, {_kind(parameter['schema'])}",
            parameter.get("description", ""),
        )
        for parameter in operation.get("parameters", [])
    )
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answers = (
        (
            status,
            " or ".join(_answer_kind(kind, content) for kind, content in answer.get("content", {}).items()),
            answer["description"],
        )
        for status, answer in operation["responses"].items()
    )
    summary = f"<b>{method.upper()}</b> <code>{escape(path)}</code> {_text(operation['summary'])}"
    shown = (
        _prose(operation["description"])
        + (f"<p>Body: {_kind(body)}</p>" if body else "")
        + _table("Parameters", parameters)
        + _table("Answers", answers)
    )
    return _folded(operation["operationId"], summary, shown)


def _folded(name: str, summary: str, shown: str) -> str:
    # The id stands inside, so that a link to it opens the fold.
    return f'<details><summary>{summary}</summary><div id="{escape(name)}">{shown}</div></details>'


def _answer_kind(media_type: str, content: dict[str, Any]) -> str:
    schema = content.get("schema", {})
    return _kind(schema) if "$ref" in schema else escape(media_type)


def _schema(name: str, schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    fields = (
        (field, _kind(inner) + ("" if field in needed else ", optional"), inner.get("description", ""))
        for field, inner in schema.get("properties", {}).items()
    )
    shown = _table("Fields", fields) or f"<p>{_kind(schema)}</p>"
    return _folded(name, f"<code>{escape(name)}</code>", _prose(schema.get("description", "")) + shown)
