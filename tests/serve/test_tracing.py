"""Traces of calls, as a collector gets them over HTTP."""

from __future__ import annotations

import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict

import httpx
import pytest
from fake_server import HELLO, Server, until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from test_server_run import model, start, wait_ready  # noqa: F401

from ds_serve.messages import Output
from ds_serve.server.observe import start_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER_KIND, ERROR = 2, 2


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the spans that are sent to it, by the id of their trace."""

    def __init__(self):
        collected = self.spans = defaultdict(list)
        self.resources = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                handler.send_response(200)
                handler.end_headers()
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    self.resources.append(values(group.resource.attributes))
                    for scope in group.scope_spans:
                        for span in scope.spans:
                            collected[span.trace_id.hex()].append(span)

            def log_message(handler, *_):  # noqa: N805
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def values(attributes) -> dict:
    found = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@pytest.fixture(scope="module")
def traced(codec, tmp_path_factory):
    """A server over a fake engine, and its collector, which gets on flush() what is there."""
    collector = Collector()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        tracing = start_tracing("fake", "1.2")

    class TracedServer(Server):
        def config(self, front):
            front.tracing = tracing
            return super().config(front)

    server = TracedServer(codec, tmp_path_factory.mktemp("ipc"))
    server.start()
    server.collector, server.flush = collector, tracing.provider.force_flush
    yield server
    server.stop()
    tracing.close()
    collector.shutdown()
    collector.server_close()


def spans_of(server, send, trace=TRACE):
    """The spans of one call, the server's first. send makes it, with these headers."""
    server.collector.spans.pop(trace, None)
    send({"traceparent": f"00-{trace}-{PARENT}-01"})

    def there():
        server.flush()
        return any(span.kind == SERVER_KIND for span in server.collector.spans[trace])

    until(there)
    return sorted(server.collector.spans[trace], key=lambda span: span.kind != SERVER_KIND)


def test_a_call_is_one_server_span_with_its_phases(traced, monkeypatch):
    def with_times(request, token_ids):
        """Queued 3 s ago, started 2 s ago, first token 1 s ago."""
        now = time.monotonic()
        return [
            Output(
                id=request.id,
                token_ids=[token],
                finish_reason="stop" if token == 1 else None,
                stop_token_id=1 if token == 1 else None,
                num_prompt_tokens=5,
                num_cached_tokens=4,
                times=(now - 3, now - 2, now - 1),
            )
            for token in (*token_ids, 1)
        ]

    monkeypatch.setattr("fake_engine.outputs", with_times)
    traced.reset()
    body = {"model": "fake", "prompt": [[5] * 5, [6] * 5], "n": 2, "temperature": 0.5, "max_tokens": 20}

    def send(headers):
        assert traced.http.post("/v1/completions", json=body, headers=headers).status_code == 200

    server_span, *children = spans_of(traced, send)
    assert server_span.name == "POST /v1/completions" and server_span.parent_span_id.hex() == PARENT
    about = values(server_span.attributes)
    assert about["http.route"] == about["url.path"] == "/v1/completions"
    assert about["http.request.method"] == "POST" and about["http.response.status_code"] == 200
    assert about["gen_ai.operation.name"] == "text_completion" and about["gen_ai.request.model"] == "fake"
    assert about["gen_ai.request.temperature"] == 0.5 and about["gen_ai.request.max_tokens"] == 20
    assert about["gen_ai.request.choice.count"] == 2
    assert about["gen_ai.usage.input_tokens"] == 10 and about["gen_ai.usage.cache_read.input_tokens"] == 8
    num_tokens = len(traced.codec.encode("hello there, 🙂 world")) + 1
    assert about["gen_ai.usage.output_tokens"] == 4 * num_tokens
    assert about["gen_ai.response.finish_reasons"] == ["stop"] * 4
    assert sorted(span.name for span in children) == sorted(["queue", "prefill", "decode"] * 4)
    for span in children:
        assert span.parent_span_id == server_span.span_id
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert seconds == pytest.approx(1, abs=1e-6) if span.name != "decode" else seconds >= 1
        assert abs(span.start_time_unix_nano - server_span.start_time_unix_nano) < 60e9, "the same clock"
    assert {values(span.attributes)["ds_serve.choice"] for span in children} == {0, 1, 2, 3}
    resource = traced.collector.resources[-1]
    assert resource["service.name"] == "ds_serve" and resource["service.version"] == "1.2"
    assert resource["deployment.environment"] == "test"


def test_streams_and_failures_have_a_span_too_and_no_span_holds_text(traced):
    traced.reset()
    secret = "hello secret world"

    def stream(headers):
        messages = [{"role": "user", "content": secret}]
        list(traced.chat(messages=messages, stream=True, extra_headers=headers))

    def refused(headers):
        body = {"model": "fake", "messages": HELLO, "nonsense": secret}
        assert traced.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 400

    def failing(headers):
        traced.refusal = lambda request: "the model broke"
        body = {"model": "fake", "messages": HELLO}
        assert traced.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 500

    streamed, *_ = spans_of(traced, stream, "1" * 32)
    bad, *rest = spans_of(traced, refused, "2" * 32)
    failed, *_ = spans_of(traced, failing, "3" * 32)
    assert values(streamed.attributes)["gen_ai.response.finish_reasons"] == ["stop"]
    assert values(streamed.attributes)["gen_ai.operation.name"] == "chat"
    assert not rest and values(bad.attributes)["http.response.status_code"] == 400
    assert bad.status.code != ERROR and failed.status.code == ERROR
    assert values(failed.attributes)["gen_ai.response.finish_reasons"] == ["error"]
    for span in (streamed, bad, failed):
        assert "secret" not in str(span) and "there" not in str(values(span.attributes).values())


def test_only_calls_that_make_tokens_are_traced_and_only_sampled_ones(traced):
    traced.reset()
    traced.http.get("/metrics", headers={"traceparent": f"00-{'4' * 32}-{PARENT}-01"})
    unsampled = {"traceparent": f"00-{'5' * 32}-{PARENT}-00"}
    traced.http.post("/v1/completions", json={"model": "fake", "prompt": "x"}, headers=unsampled)
    spans_of(traced, lambda headers: traced.chat(extra_headers=headers), "6" * 32)  # and so all are there
    assert not traced.collector.spans["4" * 32] and not traced.collector.spans["5" * 32]


def test_a_collector_that_never_answers_holds_up_the_end_for_a_bounded_time(monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1/traces"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        monkeypatch.setattr("ds_serve.server.tracing._FLUSH_S", 0.05)
        tracing = start_tracing("fake", "1")
        tracing.provider.get_tracer("test").start_span("lost").end()
        tracing.close()
    assert "could not be sent within 0.05 s" in caplog.text


def test_what_is_left_is_sent_before_the_end_of_a_drain(start, monkeypatch):  # noqa: F811
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        process = start()
        url = wait_ready(process)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"model": "tiny", "prompt": "hi"}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=20).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        collector.shutdown()
    assert [span.name for span in collector.spans[TRACE]] == ["POST /v1/completions"]


def test_other_protocols_are_refused_by_the_name_of_the_variable(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf"):
        start_tracing("fake", "1")


def test_without_an_endpoint_there_is_no_tracing_and_nothing_of_it_is_imported():
    program = """
import os, sys
for name in [name for name in os.environ if name.startswith("OTEL_")]:
    del os.environ[name]
from ds_serve.server.app import create_app
from ds_serve.server.observe import start_tracing
assert start_tracing("m", "1") is None
for name in sys.modules:
    assert not name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")), name
"""
    subprocess.run([sys.executable, "-c", program], check=True)
