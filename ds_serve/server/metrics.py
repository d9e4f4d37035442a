"""The front's own metrics: what happens to HTTP calls and to the requests in them, as Prometheus families.

Every Metrics has a registry of its own. Knows times, counts and ends; knows no text, no prompt and no trace
format (tracing.py), and the engine's side only as families that engine_metrics.py makes. observe.py makes a
Call of each HTTP call; replies.py takes its RequestWatch, and generation.py tells that what happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from ds_serve.messages import Output, Request
from ds_serve.server.accesslog import CLIENT_CLOSED
from ds_serve.server.errors import ApiError

# Routes that make tokens; refusals count as ends of theirs too.
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
ENDS = ("stop", "length", "tool_calls", "abort", "timeout", "error", "refused")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# 1 ms to 10 min, five a decade: a quantile is off by a factor of 1.67 at most.
SECONDS = tuple(
    base * scale / 1000 for scale in (1, 10, 100, 1000, 10_000, 100_000) for base in (1, 1.5, 2.5, 4, 6)
)
TOKENS = tuple(2**power for power in range(21))


class Trace(Protocol):
    """What a watch tells a call's trace; tracing.CallTrace is one."""

    def begin(self, call_id: str, requests: Sequence[Request], n: int) -> None:
        """The call asks the engine for these: n choices of each prompt, one after another."""

    def end(self, choices: Sequence[Choice]) -> None:
        """All of them have ended."""

    def reasons(self, choices: Sequence[Choice]) -> None:
        """After end(): one of them has another end than was said."""


class Metrics:
    """All families of one front."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter(
            "requests", "Requests (choices of a call) by how they ended", ["route", "end"]
        )
        for route in ROUTES:
            for end in ENDS:
                self.requests.labels(route, end)
        self.http_requests = self._counter(
            "http_requests", "HTTP calls answered", ["method", "route", "status"]
        )
        self.http_open = Gauge(
            "ds_serve_http_open_requests", "HTTP calls being answered", registry=self.registry
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a call's arrival to its first token"
        )
        self.gap = self._histogram("inter_token_latency_seconds", "Between two tokens of a request")
        self.duration = self._histogram(
            "request_duration_seconds", "From a call's arrival to a request's end"
        )
        self.queue = self._histogram("queue_seconds", "From the engine's queue to the first step")
        self.prefill = self._histogram(
            "prefill_seconds", "From the first step to the first token, in the engine"
        )
        self.prompt_tokens = self._histogram(
            "prompt_tokens_per_request", "Tokens of a request's prompt", TOKENS
        )
        self.output_tokens = self._histogram(
            "output_tokens_per_request", "Tokens that a request was given", TOKENS
        )

    def exposition(self, accept: str, more: Iterable[Metric] = ()) -> tuple[bytes, str]:
        """All families and more, as text in the format that an Accept header asks for; its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(_Families([*self.registry.collect(), *more])), content_type

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"ds_serve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"ds_serve_{name}", text, buckets=buckets, registry=self.registry)


class _Families:
    """Collected families without the _created series that the library adds: they make half as many again."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for family in self._families:
            family.samples = [each for each in family.samples if not each.name.endswith("_created")]
            yield family


class Call:
    """One HTTP call, from its arrival on. status is of an answer that nobody waited for until one begins."""

    def __init__(self, metrics: Metrics, trace: Callable[[], Trace | None] | None = None) -> None:
        """trace makes a call's trace, if it is to have one, once it makes requests."""
        self.started = time.monotonic()
        self.status = CLIENT_CLOSED
        self._metrics = metrics
        self._trace = trace
        self._watches: list[RequestWatch] = []
        metrics.http_open.inc()

    def watch(self) -> RequestWatch:
        """Who watches requests that this call makes."""
        trace = None if self._trace is None else self._trace()
        watch = RequestWatch(self._metrics, self.started, trace)
        self._watches.append(watch)
        return watch

    def ended_by_calls(self, index: int) -> None:
        """What a request gave until it stopped was calls of tools."""
        self._watches[-1].end(index, "tool_calls")

    def summary(self) -> dict[str, int | list[str]]:
        """What the call had of the engine so far, as usage counts it, and the ends of its requests."""
        watches = [watch for watch in self._watches if watch.choices]
        if not watches:
            return {}
        choices = [choice for watch in watches for choice in watch.choices]
        firsts = [choice for watch in watches for choice in watch.choices[:: watch.n]]
        return {
            "prompt_tokens": sum(choice.num_prompt_tokens for choice in firsts),
            "cached_tokens": sum(choice.num_cached_tokens for choice in firsts),
            "completion_tokens": sum(choice.num_tokens for choice in choices),
            "finish": sorted({choice.end for choice in choices}),
        }

    def end(self, method: str, route: str) -> None:
        """The answer is out, or cut off. route is the template of a route, not what was asked for."""
        metrics = self._metrics
        metrics.http_open.dec()
        metrics.http_requests.labels(method if method in METHODS else "other", route, str(self.status)).inc()
        if route not in ROUTES:
            return
        for watch in self._watches:
            watch.close(route)
        if method == "POST" and not self._watches and self.status >= 400:
            metrics.requests.labels(route, end_of_status(self.status)).inc()


class Choice:
    """What a watch keeps of one request. last is when its last tokens came; times are Output's."""

    __slots__ = ("end", "last", "num_cached_tokens", "num_prompt_tokens", "num_tokens", "times")

    def __init__(self) -> None:
        self.end = ""
        self.last = 0.0
        self.num_tokens = self.num_prompt_tokens = self.num_cached_tokens = 0
        self.times = (0.0, 0.0, 0.0)


class RequestWatch:
    """Watches the requests of one call. As a context it names the end of those that were cut short.

    Moments are of time.monotonic, which front and engine share.
    """

    def __init__(self, metrics: Metrics, started: float, trace: Trace | None = None) -> None:
        self._metrics = metrics
        self._started = started
        self._trace = trace
        self.choices: list[Choice] = []
        self.n = 1

    def begin(self, call_id: str, requests: Sequence[Request], n: int = 1) -> None:
        """These go to the engine now, n for each prompt; index counts them below."""
        self.choices = [Choice() for _ in requests]
        self.n = n
        if self._trace is not None:
            self._trace.begin(call_id, requests, n)

    def output(self, index: int, output: Output) -> None:
        """An Output of a request; where it was merged of several, their time is shared out evenly."""
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        now = time.monotonic()
        choice = self.choices[index]
        if choice.num_tokens:
            gap = (now - choice.last) / num_tokens
            for _ in range(num_tokens):
                self._metrics.gap.observe(gap)
        else:
            self._first(choice, output, now)
        choice.num_tokens += num_tokens
        choice.last = now

    def _first(self, choice: Choice, output: Output, now: float) -> None:
        metrics = self._metrics
        choice.times = queued, scheduled, first = output.times
        choice.num_prompt_tokens = output.num_prompt_tokens
        choice.num_cached_tokens = output.num_cached_tokens
        metrics.first_token.observe(now - self._started)
        metrics.prompt_tokens.observe(output.num_prompt_tokens)
        if first:
            metrics.queue.observe(scheduled - queued)
            metrics.prefill.observe(first - scheduled)

    def end(self, index: int, reason: str) -> None:
        """A request has ended, for one of ENDS. Said again before close(), the later reason counts."""
        if reason not in ENDS:
            raise ValueError(f"reason: must be one of {', '.join(ENDS)}, got {reason!r}")
        choice = self.choices[index]
        if not choice.end:
            self._metrics.duration.observe(time.monotonic() - self._started)
            self._metrics.output_tokens.observe(choice.num_tokens)
            choice.end = reason
        elif choice.end != reason:
            choice.end = reason
            if self._trace is not None:
                self._trace.reasons(self.choices)

    def __enter__(self) -> RequestWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._end_rest(_end_of_error(error))
        if self._trace is not None:
            self._trace.end(self.choices)

    def close(self, route: str) -> None:
        """The call is over: its requests are counted by their ends."""
        self._end_rest("abort")
        for choice in self.choices:
            self._metrics.requests.labels(route, choice.end).inc()

    def _end_rest(self, reason: str) -> None:
        for index, choice in enumerate(self.choices):
            if not choice.end:
                self.end(index, reason)


def end_of_status(status: int) -> str:
    """The end of a request that was answered with an error."""
    if status == CLIENT_CLOSED:
        return "abort"
    if status in (408, 504):
        return "timeout"
    return "refused" if status < 500 else "error"


def _end_of_error(error: BaseException | None) -> str:
    """Why requests that have not ended are cut short; what is no Exception is a client that went away."""
    if isinstance(error, ApiError):
        return end_of_status(error.status)
    if isinstance(error, TimeoutError):
        return "timeout"
    return "error" if isinstance(error, Exception) else "abort"
