"""Errors in OpenAI's shape, and where each kind of error of ours belongs in it.

Knows HTTP statuses; raised and handled in the routes (app.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from fastapi import Response

_PARAM = re.compile(r"([a-z_]+)[\[.:]")

_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal or failure that the client is told of: status, message, param, code, and headers beside."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)
        self.body = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body), self.status, headers=self.headers, media_type="application/json"
        )


def timed_out(seconds: float) -> ApiError:
    """504: the answer was not ready within the time that the server or the client allows."""
    return ApiError(504, f"the answer took longer than {seconds:g} s", code="timeout")


@contextmanager
def refusing() -> Iterator[None]:
    """Turns a ValueError about what the client sent into a 400."""
    try:
        yield
    except ValueError as error:
        raise from_value_error(error) from error


def from_value_error(error: ValueError) -> ApiError:
    """400. Our messages begin with the parameter's name and a colon."""
    message = str(error)
    match = _PARAM.match(message)
    return ApiError(400, message, param=match[1] if match else None)


def from_validation(errors: Sequence[dict[str, Any]]) -> ApiError:
    """400 from FastAPI's list of what is wrong: the first of it, with its path in the body."""
    first = errors[0]
    # After the place (body, path or query), and without the names of a union's members.
    path = [str(part) for part in first["loc"][1:] if not str(part).startswith("<")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if not path and first["type"] == "value_error":
        return from_value_error(first["ctx"]["error"])
    if not path:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name}: unknown or not supported", param=name, code="unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name}: required", param=name, code="missing_required_parameter")
    return ApiError(400, f"{name}: {first['msg'].removeprefix('Value error, ')}", param=path[0])


def from_engine(error: str) -> ApiError:
    """What the engine says of a request it ended with an error: refused at admission, or failed."""
    if "too long" in error or "never fit" in error:
        return ApiError(400, error, code="context_length_exceeded")
    if "queue is full" in error:
        return ApiError(429, error, code="queue_full", retry_after_s=1)
    if error.startswith("no token fits the grammar"):
        return ApiError(400, error, code="grammar_failed")
    return ApiError(500, error, code="engine_error")
