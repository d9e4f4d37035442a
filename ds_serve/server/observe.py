"""ASGI middleware, the outermost: every HTTP call is counted.

Knows calls, routes and statuses; what happens to the requests of a call its RequestWatch is told
(request.state.call.watch()). app.py puts it around everything, inside of FastAPI's own tracing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastapi.telemetry import TelemetryConfig
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_serve.server.accesslog import CLIENT_CLOSED
from ds_serve.server.metrics import ROUTES, Call, Metrics

if TYPE_CHECKING:
    from ds_serve.server.tracing import Tracing

_NO_ROUTE = "none"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """What FastAPI is to trace: calls that make tokens, by one span each, or nothing."""
    return {
        "tracing": tracing is not None,
        "tracer_provider": None if tracing is None else tracing.provider,
        "exclude": lambda scope: scope["path"] not in ROUTES,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
    }


def start_tracing(model_name: str, version: str) -> Tracing | None:
    """Tracing where the environment names an endpoint for it, else None. Raises ValueError (see Tracing)."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    from ds_serve.server.tracing import Tracing

    return Tracing(model_name, version)


class Observe:
    """Puts a Call into the state of each request."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], metrics: Metrics, tracing: Tracing | None
    ) -> None:
        self._app = app
        self._routes = routes
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = None if self._tracing is None else partial(self._tracing.call, scope["path"])
        call = Call(self._metrics, trace)
        scope.setdefault("state", {})["call"] = call

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if call.status == CLIENT_CLOSED:  # no answer has begun: FastAPI makes one around us
                call.status = 500
            raise
        finally:
            call.end(scope["method"], self._route(scope))

    def _route(self, scope: Scope) -> str:
        """The template of the route of this path, also where the call was refused before it got there."""
        route = scope.get("route")
        if route is None:
            route = next((each for each in self._routes if each.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path_format", None) or getattr(route, "path", _NO_ROUTE)
