"""The load test's arithmetic: figures of records, goals, and the search for the highest good level."""

import asyncio
import math

import numpy as np
import pytest

from ds_serve.bench.endpoints import Usage
from ds_serve.bench.records import INTERRUPTED, Record
from ds_serve.bench.slo import Goal
from ds_serve.bench.summary import Summary
from ds_serve.bench.sweep import Levels, highest_good


def record(index=0, *, intended=0.0, sent=0.0, times=(), end=1.0, kind="", usage=None):
    made = Record(index, 1, intended, sent, end, 200, times=list(times), usage=usage)
    made.kind = kind
    return made


def test_latencies_count_from_the_intended_time_and_lateness_stands_beside_them():
    late = record(intended=10.0, sent=10.5, times=[11.0, 11.25, 12.0], end=12.5, usage=Usage(7, 4))
    assert (late.ttft, late.e2e, late.lateness) == (1.0, 2.5, 0.5)
    assert late.tpot == pytest.approx(1.0 / 3)  # four tokens in three pieces
    assert late.gaps == [0.25, 0.75]


def test_percentiles_are_numpys():
    rng = np.random.default_rng(1)
    ends = rng.exponential(1.0, 997)
    summary = Summary([record(i, end=end) for i, end in enumerate(ends)], 10.0)
    for stat, at in [("p50", 50), ("p90", 90), ("p99", 99), ("p99.9", 99.9)]:
        assert summary.figure("e2e", stat) == pytest.approx(np.percentile(ends, at))
    assert summary.figure("e2e", "mean") == pytest.approx(ends.mean())
    assert summary.figure("e2e", "max") == ends.max()
    assert summary.points("ttft") == {} and math.isnan(summary.figure("ttft", "p50"))


def test_failures_are_counted_by_kind_and_have_no_latency():
    records = [
        record(0, end=1.0, usage=Usage(10, 2, 8, 4)),
        record(1, end=3.0, times=[1.0, 2.0, 2.5]),
        record(2, end=90.0, kind="timeout"),
        record(3, end=80.0, kind="http 429"),
        record(4, end=70.0, kind="timeout"),
        record(5, kind=INTERRUPTED),
    ]
    summary = Summary(records, 2.0)
    assert summary.failures == {"timeout": 2, "http 429": 1} and summary.interrupted == 1
    assert summary.success == 2 / 5 and summary.figure("e2e", "max") == 3.0
    assert summary.figure("rps") == 1.0 and summary.figure("tps") == (2 + 3) / 2
    assert (summary.hit_rate, summary.host_cached_tokens, summary.counted) == (0.8, 4, 1)
    plain = summary.plain()
    assert plain["tokens"]["requests_counted_by_pieces"] == 1
    assert plain["latency_ms"]["e2e"]["max"] == 3000.0


def test_nothing_good_is_no_zero_latency():
    summary = Summary([record(kind="connect")], 1.0)
    assert summary.success == 0.0 and math.isnan(summary.figure("e2e", "p99"))
    assert not Goal.parse("p99_e2e=1s").judge(summary).met
    assert math.isnan(Summary([], 0.0).success)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("p99_ttft=200ms", ("ttft", "p99", 0.2)),
        ("p99.9_e2e=2s", ("e2e", "p99.9", 2.0)),
        ("mean_tpot=30ms", ("tpot", "mean", 0.03)),
        ("max_itl=1.5s", ("itl", "max", 1.5)),
        ("tps=2000", ("tps", "", 2000.0)),
        ("success=99.9%", ("success", "", pytest.approx(0.999))),
    ],
)
def test_goals_are_read(text, value):
    goal = Goal.parse(text)
    assert (goal.metric, goal.stat, goal.limit) == value


@pytest.mark.parametrize(
    "text",
    ["", "ttft=200ms", "p99_ttft=200", "p99_ttft", "p99_tps=3", "tps=20ms", "success=0.9", "p99_speed=3s"],
)
def test_what_is_no_goal_is_refused_by_name(text):
    with pytest.raises(ValueError, match="--slo"):
        Goal.parse(text)


def test_a_latency_may_reach_its_limit_and_a_rate_must():
    summary = Summary([record(end=2.0), record(end=1.0)], 4.0)
    assert Goal.parse("max_e2e=2s").judge(summary).met
    assert not Goal.parse("max_e2e=1999ms").judge(summary).met
    assert Goal.parse("rps=0.5").judge(summary).met
    assert not Goal.parse("rps=0.51").judge(summary).met
    assert "measured 2,000.0 ms" in str(Goal.parse("max_e2e=2s").judge(summary))


def searched(text, limit):
    """The highest good level, and which were tried, where levels up to limit are good."""
    tried = []

    async def is_good(level):
        tried.append(level)
        return level <= limit

    return asyncio.run(highest_good(Levels.parse(text), is_good)), tried


def test_a_range_is_doubled_then_halved():
    best, tried = searched("rate=1:64", 11)
    assert tried[:5] == [1, 2, 4, 8, 16] and 10 <= best <= 11
    assert searched("rate=1:64", 100) == (64, [1, 2, 4, 8, 16, 32, 64])
    assert searched("rate=3:64", 2) == (None, [3])


def test_a_concurrency_is_searched_in_whole_numbers():
    best, tried = searched("concurrency=1:8", 5)
    assert best == 5 and all(level == int(level) for level in tried)


def test_a_list_ends_at_its_first_bad_level():
    assert searched("rate=1,2.5,4,8", 3) == (2.5, [1, 2.5, 4])


@pytest.mark.parametrize(
    "text", ["rate=", "rate=4:1", "rate=0:4", "users=1:2", "concurrency=1.5:3", "rate=1:2:3"]
)
def test_what_is_no_sweep_is_refused(text):
    with pytest.raises(ValueError):
        Levels.parse(text)
