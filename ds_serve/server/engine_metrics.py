"""The engine's metrics: its Stats and EngineInfo as Prometheus families, asked for at each scrape.

Knows messages and names; counts nothing itself. Counters begin at 0 again with each life of the engine, as
Prometheus expects of them. app.py's /metrics is its caller.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable
from contextlib import suppress

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from ds_serve.messages import EngineInfo, Stats
from ds_serve.server.client import EngineClient, EngineDeadError
from ds_serve.server.front import Backend

_TIMEOUT_S = 1.0

Values = dict[tuple[str, ...], float] | float  # by the labels' values


class EngineScrape:
    """Asks for Stats, at most one question at a time; of an engine that is busy the last answer stands."""

    def __init__(self, version: str) -> None:
        self._build = {"version": version, "python": platform.python_version()}
        self._question: asyncio.Task[None] | None = None
        self._asked: EngineClient | None = None
        self._answer: tuple[EngineClient, Stats, float] | None = None  # whose, and when it came

    async def families(self, backend: Backend) -> list[Metric]:
        """The families of the engine as it is now; where there is none, that it is down; within 1 s."""
        client = None
        try:
            client = backend.client
            await self._ask(client)
            client.check()
        except EngineDeadError:
            client = None
        families = [
            InfoMetricFamily("ds_serve_build", "Versions", value=self._build),
            _gauge("engine_up", "1 while there is an engine that takes requests", float(client is not None)),
            _counter("engine_restarts", "Engines started again after one failed", backend.num_restarts),
        ]
        if client is None:
            return families
        families.append(InfoMetricFamily("ds_serve_engine", "The engine", value=_labels(client.info)))
        if self._answer is not None and self._answer[0] is client:
            _, stats, moment = self._answer
            age = time.monotonic() - moment
            families.append(_gauge("engine_stats_age_seconds", "Age of the engine's figures", age))
            families += [
                family(name, text, read(stats), labels) for family, name, text, read, *labels in _STATS
            ]
        return families

    async def _ask(self, client: EngineClient) -> None:
        if self._question is None or self._question.done() or self._asked is not client:
            self._asked, self._question = client, asyncio.create_task(self._query(client))
        await asyncio.wait({self._question}, timeout=_TIMEOUT_S)

    async def _query(self, client: EngineClient) -> None:
        with suppress(EngineDeadError):
            self._answer = (client, await client.stats(), time.monotonic())


def _labels(info: EngineInfo) -> dict[str, str]:
    names = (
        "model",
        "device",
        "dtype",
        "tensor_parallel",
        "pipeline_parallel",
        "max_model_len",
        "block_size",
    )
    return {name: str(getattr(info, name)) for name in names}


def _gauge(name: str, text: str, values: Values, labels: list[str] = []) -> Metric:  # noqa: B006 (never changed)
    return _fill(GaugeMetricFamily(f"ds_serve_{name}", text, labels=labels), values)


def _counter(name: str, text: str, values: Values, labels: list[str] = []) -> Metric:  # noqa: B006
    return _fill(CounterMetricFamily(f"ds_serve_{name}", text, labels=labels), values)


def _fill(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for labels, value in values.items() if isinstance(values, dict) else [((), values)]:
        family.add_metric(labels, value)
    return family


def _tiers(device: float, host: float) -> Values:
    return {("device",): device, ("host",): host}


def _blocks(stats: Stats) -> Values:
    return {
        ("device", "used"): stats.num_blocks - stats.num_free_blocks,
        ("device", "free"): stats.num_free_blocks,
        ("host", "used"): stats.num_host_used,
        ("host", "free"): stats.num_host_blocks - stats.num_host_used,
    }


def _usage(stats: Stats) -> Values:
    blocks = _blocks(stats)
    return {
        (tier,): blocks[tier, "used"] / max(1, blocks[tier, "used"] + blocks[tier, "free"])
        for tier in ("device", "host")
    }


_Row = tuple[Callable[..., Metric], str, str, Callable[[Stats], Values]]  # and the labels' names

_STATS: list[_Row] = [
    (_gauge, "requests_running", "Requests in the engine's steps", lambda s: s.num_running),
    (_gauge, "requests_waiting", "Requests in the engine's queue", lambda s: s.num_waiting),
    (_counter, "engine_requests", "Requests that ended in the engine", lambda s: s.num_finished),
    (_counter, "preemptions", "Requests put back and computed again", lambda s: s.num_preemptions),
    (_counter, "steps", "Steps of the model", lambda s: s.num_steps),
    (_counter, "prompt_tokens", "Tokens of started requests' prompts", lambda s: s.prompt_tokens),
    (
        _counter,
        "cached_tokens",
        "Those of prompt_tokens that were found in the cache",
        lambda s: _tiers(s.cached_tokens - s.cached_tokens_host, s.cached_tokens_host),
        "tier",
    ),
    (_counter, "output_tokens", "Tokens drawn", lambda s: s.output_tokens),
    (_gauge, "kv_blocks", "KV blocks; a free one may hold a known prefix", _blocks, "tier", "state"),
    (_gauge, "kv_usage_ratio", "Used of all KV blocks of a tier", _usage, "tier"),
    (
        _gauge,
        "kv_cached_blocks",
        "Device blocks, used or free, with a known prefix",
        lambda s: s.num_cached_blocks,
    ),
    (_gauge, "kv_pinned_blocks", "Device blocks that prompt_cache_key keeps", lambda s: s.num_pinned_blocks),
    (_gauge, "kv_block_bytes", "Bytes of a KV block, over all ranks", lambda s: s.bytes_per_block),
    (
        _counter,
        "kv_evictions",
        "Cached blocks given out for something else",
        lambda s: _tiers(s.evictions, s.host_evictions),
        "tier",
    ),
    (
        _counter,
        "kv_lost_blocks",
        "Blocks evicted from the device before they were stored",
        lambda s: s.lost_blocks,
    ),
    (_counter, "kv_stored_blocks", "Blocks copied to the host", lambda s: s.stored_blocks),
    (_counter, "kv_loaded_blocks", "Blocks brought back from the host", lambda s: s.loaded_blocks),
    (_counter, "kv_stores", "Plans' stores to the host", lambda s: s.num_stores),
    (_counter, "kv_store_seconds", "Time of kv_stores on the slowest rank", lambda s: s.store_s),
    (_counter, "kv_loads", "Plans' loads from the host", lambda s: s.num_loads),
    (_counter, "kv_load_seconds", "Time of kv_loads on the slowest rank", lambda s: s.load_s),
    (
        _counter,
        "kv_failed_copies",
        "Blocks that could not be copied, or came back damaged",
        lambda s: s.failed_copies,
    ),
    (_counter, "audits", "Prefix hits that were computed again and compared", lambda s: s.audits),
    (
        _gauge,
        "audit_max_difference",
        "Largest difference of a log-probability that audits found",
        lambda s: s.audit_max_difference,
    ),
    (_counter, "active_seconds", "Time with a step in flight", lambda s: s.active_s),
    (
        _counter,
        "stage_busy_seconds",
        "Time that each pipeline stage computed",
        lambda s: {(str(stage),): seconds for stage, seconds in enumerate(s.stage_busy_s)},
        "stage",
    ),
    (
        _counter,
        "engine_thread_seconds",
        "Time of the engine's thread: planning steps, waiting for results, taking them in",
        lambda s: {("plan",): s.plan_s, ("wait",): s.wait_s, ("update",): s.update_s},
        "part",
    ),
]
