"""Traces by OpenTelemetry, sent by OTLP over HTTP: one server span a call, below it its requests' phases.

The server spans are FastAPI's own; this gives it the provider, and says in the words of the conventions for
generative AI what a call asked for and got. Knows times, counts and parameters, never a prompt or an answer.
Only imported where an endpoint is set (observe.start_tracing). The SDK's OTEL_* variables hold.
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
from opentelemetry.trace import Span, Tracer, get_current_span, set_span_in_context

from ds_serve.messages import Request
from ds_serve.server.metrics import Choice

log = logging.getLogger(__name__)

_FLUSH_S = 5.0  # how long the last spans may take on their way out
_OPERATIONS = {"/v1/completions": "text_completion"}
_PHASES = ("queue", "prefill", "decode")


class Tracing:
    """Owns the exporter, whose endpoint the environment names; provider is what FastAPI traces calls with."""

    def __init__(self, model_name: str, version: str) -> None:
        """Raises ValueError where the environment asks for a protocol other than OTLP over HTTP."""
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        name = next((each for each in variables if os.environ.get(each)), None)
        if name is not None and os.environ[name] != "http/protobuf":
            raise ValueError(f"{name}: only http/protobuf is supported, got {os.environ[name]!r}")
        own = Resource({"service.name": "ds_serve", "service.version": version})
        resource = Resource.get_empty().merge(own).merge(OTELResourceDetector().detect())
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer("ds_serve", version)
        self._model_name = model_name

    def call(self, path: str) -> CallTrace | None:
        """The trace of the call that is being answered here; None where it is not sampled."""
        span = get_current_span()
        return CallTrace(self._tracer, span, path, self._model_name) if span.is_recording() else None

    def close(self) -> None:
        """Sends what is left; gives up after some seconds where nobody takes it. Blocks meanwhile."""
        closing = threading.Thread(target=self.provider.shutdown, daemon=True)
        closing.start()
        closing.join(_FLUSH_S)
        if closing.is_alive():
            log.warning("traces: the last spans could not be sent within %g s", _FLUSH_S)


class CallTrace:
    """What is added to a call's span, and the spans below it. A Trace of metrics.py."""

    def __init__(self, tracer: Tracer, span: Span, path: str, model_name: str) -> None:
        self._tracer = tracer
        self._span = span
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        span.set_attributes(
            {
                "gen_ai.operation.name": _OPERATIONS.get(path, "chat"),
                "gen_ai.provider.name": "ds_serve",
                "gen_ai.request.model": model_name,
            }
        )

    def begin(self, call_id: str, requests: Sequence[Request], n: int) -> None:
        params = requests[0].params
        self._n = n
        if requests[0].adapter:
            self._span.set_attribute("gen_ai.request.model", requests[0].adapter)
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
                "gen_ai.usage.input_tokens": sum(len(each.prompt_token_ids) for each in requests[::n]),
            }
        )

    def end(self, choices: Sequence[Choice]) -> None:
        num_cached = sum(choice.num_cached_tokens for choice in choices[:: self._n])
        self._span.set_attributes(
            {
                "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
                "gen_ai.usage.cache_read.input_tokens": num_cached,
            }
        )
        self.reasons(choices)
        for index, choice in enumerate(choices):
            self._phases(index, choice)

    def reasons(self, choices: Sequence[Choice]) -> None:
        self._span.set_attribute("gen_ai.response.finish_reasons", [choice.end for choice in choices])

    def _phases(self, index: int, choice: Choice) -> None:
        """A span for each part of a choice's way that it has come to the end of."""
        moments = (*choice.times, choice.last)
        context = set_span_in_context(self._span)
        for phase, start, end in zip(_PHASES, moments[:-1], moments[1:], strict=True):
            if start and end:
                about = {"ds_serve.choice": index}
                span = self._tracer.start_span(
                    phase, context, attributes=about, start_time=self._nanoseconds(start)
                )
                span.end(self._nanoseconds(end))

    def _nanoseconds(self, moment: float) -> int:
        """Of time.monotonic in seconds -> of the wall clock."""
        return int(moment * 1e9) + self._offset_ns
