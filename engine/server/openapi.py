"""The OpenAPI document: what each path takes and answers, from the bodies' own classes and the
table below."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from engine.server.errors import ANTHROPIC
from engine.server.schemas import IGNORED, NEUTRAL

OPERATORS = ("/reset_prefix_cache", "/flush_cache")
STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
REASONS = {
    "400": "The request is wrong, or asks for what can not be served.",
    "401": "A key is asked for.",
    "403": "Only the operator may ask.",
    "404": "There is no such model, or nothing of this name.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "As many requests wait as may.",
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
    """Have ``app`` describe itself so; the document is made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _described(document)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


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
    """Everything that ``path`` may answer."""
    kinds = {PLAIN[path]: {}} if path in PLAIN else dict(known["200"].get("content", {}))
    if path in STREAMED:
        kinds["text/event-stream"] = {}
    answers: dict[str, Any] = {"200": {"description": "Done.", "content": kinds}}
    codes = ["401", "500", "503"]
    if has_body:
        codes += ["400", "404", "408", "413", "429"]
    if path in OPERATORS or path.startswith("/v1/cache"):
        codes.append("403")
    if "{" in path:
        codes += ["400", "404"]
    shape = "AnthropicError" if path.startswith(ANTHROPIC) else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    return answers | {
        code: {"description": REASONS[code], "content": content} for code in sorted(set(codes))
    }


def _say_what_null_means(schema: dict[str, Any]) -> None:
    """Null is the default of every name that may be left out, and of names that are not known."""
    if schema.get("additionalProperties") is not False:
        return
    schema["additionalProperties"] = {"type": "null"}
    required = schema.get("required", [])
    properties = schema["properties"]
    for name, shape in properties.items():
        if name not in required:
            properties[name] = {"anyOf": [shape, {"type": "null"}]}


def _say_what_is_ignored(properties: dict[str, Any]) -> None:
    """Names of OpenAI's that ask for nothing."""
    if "temperature" in properties and "n" in properties:
        properties |= {name: {} for name in sorted(IGNORED - properties.keys())}
        properties |= {name: {"enum": [*neutral, None]} for name, neutral in NEUTRAL.items()}
