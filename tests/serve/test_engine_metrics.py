"""/metrics: what the engine tells, and what stands there while it is busy or gone."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import msgspec
import pytest
from fake_engine import INFO
from fake_server import Backend
from scrapes import families, samples

from ds_serve.messages import Stats
from ds_serve.server import engine_metrics
from ds_serve.server.app import create_app
from ds_serve.server.client import EngineDeadError
from ds_serve.server.engine_metrics import EngineScrape
from ds_serve.server.front import Front
from ds_serve.server.metrics import ROUTES, Metrics


def test_the_engine_s_figures_are_its_own(server):
    figures = samples(server.http.get("/metrics").text)
    assert figures["ds_serve_engine_up", ()] == 1
    assert figures["ds_serve_kv_pinned_blocks", ()] == 3
    assert figures["ds_serve_cached_tokens_total", (("tier", "host"),)] == 5
    assert figures["ds_serve_kv_load_seconds_total", ()] == 0.25
    info = families(server.http.get("/metrics").text)["ds_serve_engine_info"].samples[0].labels
    assert info["model"] == "fake" and info["max_model_len"] == "64" and info["pipeline_parallel"] == "1"


class StubClient:
    """An engine's client that answers with stats, never (None), or not any more (an error)."""

    def __init__(self, stats):
        self.info, self.stats_now, self.asked = INFO, stats, 0

    def check(self):
        if isinstance(self.stats_now, Exception):
            raise self.stats_now

    async def stats(self):
        self.asked += 1
        self.check()
        if self.stats_now is None:
            await asyncio.get_running_loop().create_future()
        return self.stats_now


def figures_of(found: list) -> Counter:
    return samples(Metrics().exposition("", found)[0].decode())


def scraped(stats: Stats) -> Counter:
    return figures_of(asyncio.run(EngineScrape("1").families(Backend(StubClient(stats)))))


@pytest.mark.parametrize("name", Stats.__struct_fields__)
def test_every_figure_of_the_engine_is_exported(name):
    base = Stats(
        num_blocks=100, num_free_blocks=40, num_host_blocks=100, cached_tokens=9, stage_busy_s=[1.0, 2.0]
    )
    value = [3.0, 2.0] if name == "stage_busy_s" else getattr(base, name) + 7
    exported = [
        {
            key: figure
            for key, figure in scraped(stats).items()
            if not key[0].startswith(("process", "ds_serve_engine_stats_age"))
        }
        for stats in (base, msgspec.structs.replace(base, **{name: value}))
    ]
    assert exported[0] != exported[1]


def test_blocks_of_a_tier_add_up_and_ratios_are_ratios():
    figures = scraped(
        Stats(num_blocks=80, num_free_blocks=20, num_host_blocks=50, num_host_used=5, stage_busy_s=[3.0, 4.5])
    )
    assert [
        figures["ds_serve_kv_blocks", (("state", state), ("tier", tier))]
        for tier in ("device", "host")
        for state in ("used", "free")
    ] == [60, 20, 5, 45]
    assert figures["ds_serve_kv_usage_ratio", (("tier", "device"),)] == 0.75
    assert figures["ds_serve_kv_usage_ratio", (("tier", "host"),)] == 0.1
    assert figures["ds_serve_stage_busy_seconds_total", (("stage", "1"),)] == 4.5
    assert scraped(Stats())["ds_serve_kv_usage_ratio", (("tier", "host"),)] == 0, "no host tier"


def test_of_a_busy_engine_the_last_answer_stands(monkeypatch):
    monkeypatch.setattr(engine_metrics, "_TIMEOUT_S", 0.01)

    async def scrape_thrice():
        client = StubClient(Stats(num_running=4))
        scrape, backend = EngineScrape("1"), Backend(client)
        first = await scrape.families(backend)
        client.stats_now = None
        late = [await scrape.families(backend) for _ in range(2)]
        return [figures_of(each) for each in (first, *late)], client.asked

    (first, *late), asked = asyncio.run(scrape_thrice())
    age = ("ds_serve_engine_stats_age_seconds", ())
    for figures in (first, *late):
        assert figures["ds_serve_requests_running", ()] == 4 and figures["ds_serve_engine_up", ()] == 1
    assert first[age] < late[0][age] < late[1][age]
    assert asked == 2, "a question that is open is not asked again"


def test_without_an_engine_the_front_still_answers():
    class Down:
        retry_after_s, num_restarts = 1, 2

        @property
        def client(self):
            raise EngineDeadError("the engine is starting again")

    async def ask():
        front = Front("fake", None, Down(), created=1)
        transport = httpx.ASGITransport(create_app(front))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/completions", json={"model": "fake", "prompt": "x"})
            return await client.get("/metrics")

    answer = asyncio.run(ask())
    figures = samples(answer.text)
    assert answer.status_code == 200 and figures["ds_serve_engine_up", ()] == 0
    assert figures["ds_serve_engine_restarts_total", ()] == 2
    assert figures["ds_serve_requests_total", (("end", "error"), ("route", ROUTES[0]))] == 1
    assert "ds_serve_requests_running" not in families(answer.text)


def test_an_engine_that_dies_while_it_is_asked_is_down():
    client = StubClient(Stats())
    found = asyncio.run(EngineScrape("1").families(Backend(client)))
    assert figures_of(found)["ds_serve_engine_up", ()] == 1
    client.stats_now = EngineDeadError("gone")
    backend = type("Was", (), {"client": client, "num_restarts": 0})()
    found = asyncio.run(EngineScrape("1").families(backend))
    assert figures_of(found)["ds_serve_engine_up", ()] == 0


def test_a_real_engine_fills_them(real):
    num_tokens = real.chat(max_tokens=5).usage.completion_tokens
    figures = samples(httpx.get(f"{real.url}/metrics", timeout=10).text)
    for name in ("queue_seconds_sum", "prefill_seconds_sum", "time_to_first_token_seconds_sum"):
        assert figures[f"ds_serve_{name}", ()] > 0
    assert figures["ds_serve_output_tokens_total", ()] >= num_tokens
    assert figures["ds_serve_prompt_tokens_total", ()] > 0
    blocks = [
        figures["ds_serve_kv_blocks", (("state", state), ("tier", "device"))] for state in ("used", "free")
    ]
    assert sum(blocks) == 256 and figures["ds_serve_kv_block_bytes", ()] > 0
    parts = [
        figures["ds_serve_engine_thread_seconds_total", (("part", part),)]
        for part in ("plan", "wait", "update")
    ]
    active = figures["ds_serve_active_seconds_total", ()]
    assert min(parts) > 0 and active > 0
    assert 0 < figures["ds_serve_stage_busy_seconds_total", (("stage", "0"),)] <= active
