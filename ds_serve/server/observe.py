"""ASGI middleware, the outermost: every HTTP call is counted, and traced where tracing is on.

Knows calls, routes and statuses; what happens to the requests of a call its RequestWatch is told
(request.state.call.watch()). app.py puts it around everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_serve.server.metrics import Call, Metrics

if TYPE_CHECKING:
    from ds_serve.server.tracing import Tracing

_NO_ROUTE = "none"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


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
        trace = None if self._tracing is None else self._tracing.call(scope)
        call = Call(self._metrics, trace)
        scope.setdefault("state", {})["call"] = call

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = self._route(scope)
            call.end(scope["method"], route)
            if trace is not None:
                trace.close(call.status)

    def _route(self, scope: Scope) -> str:
        """The template of the route that answered, or would have, where the call was refused before."""
        route = scope.get("route")
        if route is None:
            route = next((each for each in self._routes if each.matches(scope)[0] is Match.FULL), None)
        return getattr(route, "path", _NO_ROUTE)
