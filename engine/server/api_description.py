"""Description of the API: the OpenAPI document, and a page that shows it without any script or
file from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from engine.server.access import OPERATORS
from engine.server.api_errors import ANTHROPIC
from engine.server.schemas import NEUTRAL

STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
REASONS = {
    "400": "The request is invalid or not supported.",
    "401": "A key is required.",
    "403": "Only the operator has access.",
    "404": "The model or the object does not exist.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "The queue of waiting requests is full.",
    "500": "The engine failed on this request.",
    "503": "The engine has stopped.",
}
PLAIN = {
    "/metrics": "text/plain",
    "/": "text/html",
    "/v1/cache/events": "text/event-stream",
}
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": TEXT_OR_NULL,
                "code": TEXT_OR_NULL,
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def install(app: FastAPI) -> None:
    """Set the OpenAPI description of ``app``, which is built on first use, and add ``/docs``."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.state.extensions.load_all()
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _described(document)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return Response(_page(openapi()), media_type="text/html", headers=HEADERS)


def _described(document: dict[str, Any]) -> dict[str, Any]:
    shapes = {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            body = operation.get("requestBody")
            if body is not None:
                schema = body["content"]["application/json"]["schema"]
                kind = schema["title"]
                for name, shape in schema.pop("$defs", {}).items():
                    _say_what_null_means(shape)
                    shapes[f"{kind}.{name}"] = shape
                _say_what_null_means(schema)
                _say_what_is_ignored(schema["properties"])
            operation["responses"] = _responses(path, operation["responses"], body is not None)
    document["components"] = {"schemas": shapes}
    return document


def _responses(path: str, known: dict[str, Any], has_body: bool) -> dict[str, Any]:
    """Return all possible answers of ``path``."""
    kinds = {PLAIN[path]: {}} if path in PLAIN else dict(known["200"].get("content", {}))
    if path in STREAMED:
        kinds["text/event-stream"] = {}
    answers: dict[str, Any] = {"200": {"description": "Done.", "content": kinds}}
    codes = ["401", "500", "503"]
    if has_body:
        codes += ["400", "404", "408", "413", "429"]
    if path.startswith(OPERATORS):
        codes.append("403")
    if "{" in path:
        codes += ["400", "404"]
    shape = "AnthropicError" if path.startswith(ANTHROPIC) else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    return answers | {
        code: {"description": REASONS[code], "content": content} for code in sorted(set(codes))
    }


def _say_what_null_means(schema: dict[str, Any]) -> None:
    """Allow null for every optional name and for unknown names."""
    if schema.get("additionalProperties") is not False:
        return
    schema["additionalProperties"] = {"type": "null"}
    required = schema.get("required", [])
    properties = schema["properties"]
    for name, shape in properties.items():
        if name not in required:
            properties[name] = {"anyOf": [shape, {"type": "null"}]}


def _say_what_is_ignored(properties: dict[str, Any]) -> None:
    """Add the unsupported parameters of OpenAI's API, with the values that have no effect."""
    if "temperature" in properties and "n" in properties:
        properties |= {name: {"enum": [*neutral, None]} for name, neutral in NEUTRAL.items()}


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code { font-size: 13px; overflow-wrap: anywhere }
summary { padding: .3rem 0; cursor: pointer }
table { border-collapse: collapse; margin: .3rem 0 1rem 1rem }
td { border-top: 1px solid #8885; padding: .2rem 1.2rem .2rem 0; vertical-align: top }
"""


def _page(document: dict[str, Any]) -> str:
    """Return the OpenAPI ``document`` as a page. O(its size)."""
    shapes = document["components"]["schemas"]
    title = escape(document["info"]["title"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}: API</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{STYLE}</style><h1>{title} {escape(document['info']['version'])}</h1>",
        "<p>All paths of this server, with the parameters of their bodies. <a href=/openapi.json>"
        "/openapi.json</a> has the same with every status and error.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = f"<code>{method.upper()} {escape(path)}</code>"
            body = operation.get("requestBody")
            if body is None:
                parts.append(f"<p>{name}</p>")
            else:
                schema = body["content"]["application/json"]["schema"]
                parts.append(
                    f"<details><summary>{name}</summary>{_table(schema, shapes)}</details>"
                )
    return "\n".join(parts)


def _table(schema: dict[str, Any], shapes: dict[str, Any]) -> str:
    """Return the properties of an object as a table. Objects inside it are tables too."""
    required = schema.get("required", ())
    rows = []
    for name, shape in schema["properties"].items():
        kinds = list(dict.fromkeys(_kinds(shape)))
        said = " or ".join(escape(kind) for kind in kinds if kind != "null")
        inner = "".join(
            f"<details><summary>{escape(one.rpartition('.')[2])}</summary>"
            f"{_table(shapes[one], shapes)}</details>"
            for one in dict.fromkeys(_objects(shape))
            if "properties" in shapes[one]
        )
        mark = " (required)" if name in required else ""
        rows.append(f"<tr><td><code>{escape(name)}</code>{mark}<td>{said}{inner}")
    return f"<table>{''.join(rows)}</table>"


def _kinds(shape: dict[str, Any]) -> Iterator[str]:
    """Yield the types that a value of ``shape`` may have, for a reader."""
    choices = shape.get("anyOf") or shape.get("oneOf")
    if choices:
        for choice in choices:
            yield from _kinds(choice)
    elif "enum" in shape:
        yield from (
            str(value) if isinstance(value, str) else repr(value) for value in shape["enum"]
        )
    elif "const" in shape:
        yield str(shape["const"])
    elif "$ref" in shape:
        yield shape["$ref"].rpartition(".")[2]
    elif shape.get("type") == "array":
        yield "list of " + " or ".join(_kinds(shape.get("items", {})))
    else:
        kind = str(shape.get("type", "any value"))
        least, most = shape.get("minimum"), shape.get("maximum")
        yield f"{kind} from {least:.10g} to {most:.10g}" if None not in (least, most) else kind


def _objects(shape: Any) -> Iterator[str]:
    """Yield the names of the objects that ``shape`` refers to."""
    if isinstance(shape, dict):
        if "$ref" in shape:
            yield shape["$ref"].rpartition("/")[2]
        for value in shape.values():
            yield from _objects(value)
    elif isinstance(shape, list):
        for value in shape:
            yield from _objects(value)
