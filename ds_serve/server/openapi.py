"""The OpenAPI document: FastAPI's, and what it cannot know: the gate's answers, errors' shape, the key.

Knows the gate's rules and how routes are told apart. Called by app.py; tests/clients holds the routes to it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from ds_serve.server.gate import SERVICE_PATHS, TIMEOUT_HEADER
from ds_serve.server.openai_reply import ErrorReply

_ERRORS = {
    "400": "A parameter is missing, wrong or unknown; param names it.",
    "401": "No key, or none that this server accepts.",
    "404": "No such model.",
    "408": "The request did not arrive in time.",
    "413": "The request is larger than this server takes.",
    "429": "The server is full: try again after Retry-After seconds.",
    "500": "The server or the engine failed at this request.",
    "503": "No engine, or none that takes requests: try again after Retry-After seconds.",
    "504": "The answer was not ready in time.",
}
_RETRIED = ("429", "503")
_KEY = {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."}
_TIMEOUT = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "description": "Seconds that the answer may take.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


def document(app: FastAPI, *, gated: bool, asks_for_key: bool) -> None:
    """Completes what app.openapi() makes; the routes must all be there when it is first called."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(plain(), gated, asks_for_key)
        return app.openapi_schema

    app.openapi = openapi


def _complete(schema: dict[str, Any], gated: bool, asks_for_key: bool) -> dict[str, Any]:
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in (
        "HTTPValidationError",
        "ValidationError",
    ):  # FastAPI's own shape: from_validation has another
        schemas.pop(name, None)
    error = ErrorReply.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= error.pop("$defs") | {"ErrorReply": error}
    components["responses"] = {status: _error(status) for status in _ERRORS}
    if asks_for_key:
        components["securitySchemes"] = {"key": _KEY}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            _add_errors(operation, _statuses(path, operation, gated, asks_for_key))
            if asks_for_key and path not in SERVICE_PATHS:
                operation["security"] = [{"key": []}]
            if gated and _generates(path):
                operation.setdefault("parameters", []).append(_TIMEOUT)
    return schema


def _error(status: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
    }
    if status in _RETRIED:
        found["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}}
    return found


def _generates(path: str) -> bool:
    return path in ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def _statuses(path: str, operation: dict[str, Any], gated: bool, asks_for_key: bool) -> set[str]:
    """The errors that an operation may answer with."""
    statuses = {"500"}
    if path not in ("/version", "/metrics"):
        statuses.add("503")
    if gated or "requestBody" in operation:
        statuses.add("400")
    if "requestBody" in operation or path.startswith("/v1/models/"):
        statuses.add("404")
    if _generates(path):
        statuses |= {"429", "504"}
    if gated and path not in SERVICE_PATHS:
        statuses |= {"429"} | ({"401"} if asks_for_key else set())
        if "requestBody" in operation:
            statuses |= {"408", "413"}
    return statuses


def _add_errors(operation: dict[str, Any], statuses: set[str]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for status in sorted(statuses - responses.keys()):
        responses[status] = {"$ref": f"#/components/responses/{status}"}
