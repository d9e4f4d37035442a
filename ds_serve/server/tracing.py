"""Traces by OpenTelemetry, sent by OTLP over HTTP: one server span a call, below it its requests' phases.

Names follow OpenTelemetry's conventions for HTTP and for generative AI. Knows times, counts and parameters,
never a prompt or an answer. Only imported where an endpoint is set (observe.start_tracing): else it costs
nothing. The SDK's own OTEL_* variables (headers, sampler, service name, batch sizes) hold.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from ds_serve.messages import Request
from ds_serve.server.metrics import ROUTES, Choice

log = logging.getLogger(__name__)

_FLUSH_S = 5.0  # how long the last spans may take on their way out
_OPERATIONS = {"/v1/completions": "text_completion"}
_PHASES = ("queue", "prefill", "decode")


class Tracing:
    """Owns the exporter, whose endpoint the environment names."""

    def __init__(self, model_name: str, version: str) -> None:
        """Raises ValueError where the environment asks for a protocol other than OTLP over HTTP."""
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        name = next((each for each in variables if os.environ.get(each)), None)
        if name is not None and os.environ[name] != "http/protobuf":
            raise ValueError(f"{name}: only http/protobuf is supported, got {os.environ[name]!r}")
        own = Resource({"service.name": "ds_serve", "service.version": version})
        resource = Resource.get_empty().merge(own).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ds_serve", version)
        self._model_name = model_name

    def call(self, scope: Scope) -> CallTrace | None:
        """The trace of a call that makes tokens, child of the traceparent in its headers; None for others."""
        if scope["path"] not in ROUTES:
            return None
        return CallTrace(self._tracer, scope, self._model_name)

    def close(self) -> None:
        """Sends what is left; gives up after some seconds where nobody takes it."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_FLUSH_S)
        if closing.is_alive():
            log.warning("traces: the last spans could not be sent within %g s", _FLUSH_S)


class CallTrace:
    """The span of one call. A Trace of metrics.py, until close()."""

    def __init__(self, tracer: Tracer, scope: Scope, model_name: str) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        route = scope["path"]
        self._tracer = tracer
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._n = 1
        self._num_input_tokens = 0
        self._span = tracer.start_span(
            f"{scope['method']} {route}",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": route,
                "url.path": route,
                "url.scheme": scope["scheme"],
                "gen_ai.operation.name": _OPERATIONS.get(route, "chat"),
                "gen_ai.provider.name": "ds_serve",
                "gen_ai.request.model": model_name,
            },
        )

    def begin(self, call_id: str, requests: Sequence[Request], n: int) -> None:
        params = requests[0].params
        self._n = n
        self._num_input_tokens = sum(len(request.prompt_token_ids) for request in requests[::n])
        self._span.set_attributes(
            {
                "gen_ai.response.id": call_id,
                "gen_ai.request.choice.count": n,
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.top_k": params.top_k,
                "gen_ai.request.presence_penalty": params.presence_penalty,
                "gen_ai.request.frequency_penalty": params.frequency_penalty,
            }
        )

    def end(self, choices: Sequence[Choice]) -> None:
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": self._num_input_tokens,
                "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
                "gen_ai.usage.cache_read.input_tokens": sum(
                    choice.num_cached_tokens for choice in choices[:: self._n]
                ),
                "gen_ai.response.finish_reasons": [choice.end for choice in choices],
            }
        )
        for index, choice in enumerate(choices):
            self._phases(index, choice)

    def _phases(self, index: int, choice: Choice) -> None:
        """A child span for each part of a choice's way that has been reached."""
        moments = (*choice.times, choice.last)
        context = set_span_in_context(self._span)
        for phase, start, end in zip(_PHASES, moments, moments[1:], strict=True):
            if start and end:
                span = self._tracer.start_span(
                    phase, context, attributes={"ds_serve.choice": index}, start_time=self._ns(start)
                )
                span.end(self._ns(end))

    def _ns(self, moment: float) -> int:
        """Of time.monotonic in seconds -> of the wall clock in nanoseconds."""
        return int(moment * 1e9) + self._offset_ns

    def close(self, status: int) -> None:
        """The answer is out, with this HTTP status."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
