"""/metrics: what the front counts, against what was asked for."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fake_server import HELLO, error_of, until
from gated_server import gated
from prometheus_client.registry import CollectorRegistry
from scrapes import families, samples

from ds_serve.messages import Output, Request, SamplingParams
from ds_serve.server.client import EngineDeadError
from ds_serve.server.errors import ApiError
from ds_serve.server.metrics import ENDS, ROUTES, SECONDS, Call, Metrics

COMPLETIONS, CHAT = ROUTES[:2]


class Gained:
    """What a server's figures have gained since then: gained("requests_total", end="stop", route=...)."""

    def __init__(self, server):
        self._server = server
        self._before = samples(server.http.get("/metrics").text)

    def __call__(self, name: str, **labels: str) -> float:
        key = (f"ds_serve_{name}", tuple(sorted(labels.items())))
        return samples(self._server.http.get("/metrics").text)[key] - self._before[key]


@pytest.fixture
def gained(server):
    return Gained(server)


def test_what_a_request_was_given_and_how_long_it_took(server, gained):
    server.reply = lambda request: [30, 31, 32]
    reply = server.post("completions", prompt=[5, 6, 7, 8, 9], max_tokens=3)
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert gained("requests_total", route=COMPLETIONS, end="length") == 1
    assert gained("time_to_first_token_seconds_count") == gained("request_duration_seconds_count") == 1
    assert gained("prompt_tokens_per_request_sum") == 5 and gained("output_tokens_per_request_sum") == 3
    assert gained("output_tokens_per_request_bucket", le="2.0") == 0
    assert gained("output_tokens_per_request_bucket", le="4.0") == 1


def test_choices_of_a_stream_count_one_by_one(server, gained):
    list(server.chat(stream=True, n=3))
    assert gained("requests_total", route=CHAT, end="stop") == 3
    assert gained("time_to_first_token_seconds_count") == 3
    assert gained("http_requests_total", method="POST", route=CHAT, status="200") == 1


def test_a_stop_string_ends_a_request_once(server, gained):
    server.chat(stop=["there"])
    assert gained("requests_total", route=CHAT, end="stop") == 1
    assert gained("request_duration_seconds_count") == 1


def test_who_goes_away_aborts(server, gained):
    server.engine.hold.set()
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json={"model": "fake", "prompt": "x"}, timeout=0.05)
    until(lambda: gained("requests_total", route=COMPLETIONS, end="abort") == 1)
    until(lambda: gained("http_requests_total", method="POST", route=COMPLETIONS, status="499") == 1)
    server.engine.hold.clear()
    server.engine.step_s = 0.01
    with server.chat(stream=True) as stream:
        next(stream)
    until(lambda: gained("requests_total", route=CHAT, end="abort") == 1)
    assert gained("output_tokens_per_request_count") == 2


def test_what_front_or_engine_refuse(server, gained):
    assert error_of(server.post("completions", prompt="x", best=2))[0] == 400
    server.refusal = lambda request: "the queue is full: 3 requests are waiting"
    assert error_of(server.post("completions", prompt="x", n=2))[0] == 429
    assert gained("requests_total", route=COMPLETIONS, end="refused") == 1 + 2
    server.refusal = lambda request: "the model gave logits that are not finite"
    assert error_of(server.post("chat/completions", messages=HELLO))[0] == 500
    assert gained("requests_total", route=CHAT, end="error") == 1
    assert gained("time_to_first_token_seconds_count") == 0


def test_http_calls_are_counted_by_template(server, gained):
    server.http.get("/v1/models/fake")
    server.http.get("/v1/models/other")
    server.http.get("/nothing/here")
    server.http.get("/v1/completions")
    server.http.request("PROPFIND", "/v1/completions")
    model = "/v1/models/{name}"
    assert gained("http_requests_total", method="GET", route=model, status="200") == 1
    assert gained("http_requests_total", method="GET", route=model, status="404") == 1
    assert gained("http_requests_total", method="GET", route="none", status="404") == 1
    assert gained("http_requests_total", method="GET", route=COMPLETIONS, status="405") == 1
    assert gained("http_requests_total", method="other", route=COMPLETIONS, status="405") == 1
    assert gained("requests_total", route=COMPLETIONS, end="refused") == 0, "nobody asked for tokens"
    assert gained("http_open_requests") == 0


def test_what_the_gate_turns_away_counts_by_its_route(codec, tmp_path):
    with gated(codec, tmp_path, api_keys=["sk-hush"], open_metrics=True) as server:
        gained = Gained(server)
        assert server.post("completions", prompt="x").status_code == 401
        assert gained("http_requests_total", method="POST", route=COMPLETIONS, status="401") == 1
        assert gained("requests_total", route=COMPLETIONS, end="refused") == 1
        server.http.head("/health")
        assert gained("http_requests_total", method="HEAD", route="/health", status="200") == 1


# -- one call's watch --------------------------------------------------------------------------


class Watched:
    """A call of two requests of its own Metrics, on a clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 50.0
        monkeypatch.setattr("ds_serve.server.metrics.time.monotonic", lambda: self.now)
        self.metrics = Metrics()
        self.call = Call(self.metrics)
        self.watch = self.call.watch()
        request = Request(id="a", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=9))
        self.watch.begin("call", [request, request])

    def output(self, index, moment, token_ids, times=(0.0, 0.0, 0.0)):
        self.now = moment
        self.watch.output(index, Output(id="a", token_ids=token_ids, num_prompt_tokens=2, times=times))

    def figures(self):
        self.call.end("POST", CHAT)
        return {
            ",".join((name.removeprefix("ds_serve_"), *(value for _, value in labels))): figure
            for (name, labels), figure in samples(self.metrics.exposition("")[0].decode()).items()
            if figure and "_bucket" not in name and name.startswith("ds_serve")
        }


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_times_of_a_request(watched):
    with watched.watch as watch:
        watched.output(0, 53.0, [7], times=(51.0, 51.25, 52.75))
        watched.output(0, 54.0, [8])
        watched.output(0, 57.0, [9, 9, 9])  # merged: three tokens in three seconds
        watch.end(0, "length")
        watched.output(1, 58.0, [7], times=(51.0, 57.0, 57.5))
        watch.end(1, "stop")
    figures = watched.figures()
    assert figures["time_to_first_token_seconds_sum"] == 3 + 8
    assert (figures["inter_token_latency_seconds_count"], figures["inter_token_latency_seconds_sum"]) == (
        4,
        4,
    )
    assert figures["queue_seconds_sum"] == 0.25 + 6 and figures["prefill_seconds_sum"] == 1.5 + 0.5
    assert figures["request_duration_seconds_sum"] == 7 + 8
    assert figures["output_tokens_per_request_sum"] == 5 + 1
    assert figures[f"requests_total,length,{CHAT}"] == figures[f"requests_total,stop,{CHAT}"] == 1


@pytest.mark.parametrize(
    "error, end",
    [
        (asyncio.CancelledError(), "abort"),
        (GeneratorExit(), "abort"),
        (ApiError(429, "full"), "refused"),
        (ApiError(504, "late"), "timeout"),
        (ApiError(500, "broken"), "error"),
        (EngineDeadError("gone"), "error"),
    ],
)
def test_what_cuts_requests_short_names_the_end_of_those_that_are_open(watched, error, end):
    with pytest.raises(type(error)), watched.watch as watch:
        watch.end(0, "stop")
        raise error
    assert watched.figures()[f"requests_total,{end},{CHAT}"] == 1


def test_a_call_whose_requests_never_began_was_aborted(watched):
    assert watched.figures()[f"requests_total,abort,{CHAT}"] == 2


def test_the_later_of_two_ends_counts_and_others_are_refused(watched):
    with watched.watch as watch:
        watch.end(0, "stop")
        watch.end(1, "stop")
    watched.call.ended_by_calls(1)
    with pytest.raises(ValueError, match="reason: must be one of stop, "):
        watched.watch.end(0, "boredom")
    figures = watched.figures()
    assert figures[f"requests_total,stop,{CHAT}"] == figures[f"requests_total,tool_calls,{CHAT}"] == 1
    assert figures["request_duration_seconds_count"] == 2


# -- families -----------------------------------------------------------------------------------


def test_all_ends_of_all_routes_are_there_from_the_start():
    requests = families(Metrics().exposition("")[0].decode())["ds_serve_requests"]
    assert len(requests.samples) == len(ENDS) * len(ROUTES)
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 600.0) and list(SECONDS) == sorted(set(SECONDS))


def test_two_fronts_of_a_process_share_nothing():
    one, two = Metrics(), Metrics()
    Call(one).end("GET", "/health")
    assert isinstance(one.registry, CollectorRegistry) and one.registry is not two.registry
    assert not families(two.exposition("")[0].decode())["ds_serve_http_requests"].samples
