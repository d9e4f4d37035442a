"""The scheduler's rules for a pipeline of stages, one by one, and how busy they keep the stages."""

from __future__ import annotations

from collections import deque
from itertools import islice

import pytest
import stage_times
from simulated import SimulatedWorker, expected_output, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.engine.limits import MIN_CHUNK_TOKENS, Limits
from ds_serve.engine.scheduler import Scheduler

BLOCK = 4


class Pipeline:
    """A scheduler and its simulated stages: plans as the loop does, takes in one result at a time."""

    def __init__(self, num_stages, num_blocks=4096, **limits):
        defaults = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 4096}
        limits = {"max_steps_in_flight": num_stages + 1, "num_stages": num_stages} | defaults | limits
        self.scheduler = Scheduler(Limits(**limits), CacheManager(num_blocks, BLOCK))
        self.worker = SimulatedWorker(num_blocks, BLOCK, limits["max_num_seqs"], num_stages)
        self.results = deque()
        self.tokens = {}

    def add(self, *requests):
        for request in requests:
            assert self.scheduler.add(request) is None
            self.tokens[request.id] = []

    def plan(self):
        """Every step that can be planned now."""
        plans = []
        while self.scheduler.can_plan and (plan := self.scheduler.schedule()) is not None:
            self.results.append(self.worker.run(plan))
            plans.append(plan)
        return plans

    def land(self):
        for output in self.scheduler.update(self.results.popleft()):
            self.tokens[output.id] += output.token_ids
        self.scheduler.check_integrity()

    def plans(self):
        """All plans until every request has ended."""
        while self.scheduler.num_open:
            yield from self.plan()
            self.land()


def prompt(length, first=1):
    return [first] + [index % 47 for index in range(length - 1)]


def rows(plan):
    return [(row.start, row.count, row.sample) for row in plan.rows]


def test_decodes_are_spread_evenly_and_stay_where_they_are():
    pipeline = Pipeline(2)
    pipeline.add(*(make_request(i, [i, 2], 20) for i in range(32)))
    batches = [{row.slot for row in plan.rows} for plan in islice(pipeline.plans(), 1, 13)]
    assert [len(batch) for batch in batches] == [16] * 12
    assert batches[0].isdisjoint(batches[1])
    assert batches == batches[:2] * 6


def test_batches_that_lost_requests_are_evened_out():
    pipeline = Pipeline(2)
    pipeline.add(*(make_request(i, [i, 2], 4 if i < 12 else 40) for i in range(32)))
    sizes = [len(plan.rows) for plan in pipeline.plans()]
    assert sizes[1:3] == [16, 16]
    assert sizes[10:-4] == [10] * len(sizes[10:-4])


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_a_step_a_stage_is_in_flight_and_one_that_waits(num_stages):
    pipeline = Pipeline(num_stages)
    pipeline.add(*(make_request(i, [i, 2, 3], 9) for i in range(12)))
    assert max(len(pipeline.results) for _ in pipeline.plans()) == num_stages + 1


def test_a_lone_request_waits_for_no_word_of_its_tokens():
    pipeline = Pipeline(2)
    pipeline.add(make_request("a", [1, 2, 3], 5))
    assert [rows(plan) for plan in pipeline.plan()] == [[(0, 3, True)], [(3, 1, True)], [(4, 1, True)]]
    pipeline.land()
    assert [rows(plan) for plan in pipeline.plan()] == [[(5, 1, True)]]


@pytest.mark.parametrize("num_stages", [2, 3])
def test_batches_take_turns_while_their_tokens_are_drawn(num_stages):
    pipeline = Pipeline(num_stages)
    pipeline.add(*(make_request(i, [i, 2], 30) for i in range(6)))
    batches = [{row.slot for row in plan.rows} for plan in islice(pipeline.plans(), 6, 18)]
    assert batches == batches[:num_stages] * (12 // num_stages)
    assert sum(map(len, batches[:num_stages])) == 6


def test_a_lone_long_prompt_fills_the_stages():
    pipeline = Pipeline(2)
    pipeline.add(make_request("a", prompt(1000), 1))
    chunks = [[(0, 250, False)], [(250, 250, False)], [(500, 250, False)]]
    assert [rows(plan) for plan in pipeline.plan()] == chunks
    pipeline.land()
    assert [rows(plan) for plan in pipeline.plan()] == [[(750, 250, True)]]


def test_short_prompts_are_not_cut_and_waiting_ones_are_shared_out():
    pipeline = Pipeline(2)
    pipeline.add(make_request("a", prompt(MIN_CHUNK_TOKENS), 1))
    assert [rows(plan) for plan in pipeline.plan()] == [[(0, MIN_CHUNK_TOKENS, True)]]
    pipeline = Pipeline(2)
    pipeline.add(*(make_request(i, prompt(100, i), 1) for i in range(16)))
    assert [[row.count for row in plan.rows] for plan in pipeline.plan()] == [[100] * 4] * 3


def test_what_the_cache_holds_is_not_shared_out():
    pipeline = Pipeline(2)
    pipeline.add(make_request("a", prompt(3000), 1))
    list(pipeline.plans())
    pipeline.add(make_request("b", prompt(3000) + [48] * 1000, 1))
    chunks = [[(3000, 250, False)], [(3250, 250, False)], [(3500, 250, False)]]
    assert [rows(plan) for plan in pipeline.plan()] == chunks


@pytest.mark.parametrize("num_stages", [2, 4])
def test_chunks_do_not_stop_decodes(num_stages):
    pipeline = Pipeline(num_stages, max_num_batched_tokens=200)
    pipeline.add(*(make_request(i, [i, 2], 60) for i in range(8)))
    for _ in range(2):
        pipeline.plan()
        pipeline.land()
    pipeline.add(make_request("long", prompt(3000), 1))
    while not pipeline.tokens["long"]:
        before = {name: len(tokens) for name, tokens in pipeline.tokens.items()}
        for _ in range(num_stages):
            pipeline.plan()
            pipeline.land()
        assert all(len(pipeline.tokens[str(i)]) > before[str(i)] for i in range(8))


def test_one_step_in_flight_takes_every_request_along():
    pipeline = Pipeline(4, max_steps_in_flight=1)
    pipeline.add(*(make_request(i, [i, 2], 5) for i in range(8)))
    assert [len(plan.rows) for plan in pipeline.plans()] == [8] * 5


def test_more_decodes_than_the_smallest_chunk_still_go_evenly():
    pipeline = Pipeline(2, max_num_seqs=600)
    pipeline.add(*(make_request(i, [i % 50, i // 50], 30) for i in range(600)))
    sizes = [len(plan.rows) for plan in islice(pipeline.plans(), 8, 16)]
    assert sizes == [300] * 8


def test_a_readmitted_sequence_brings_everything_that_was_drawn():
    pipeline = Pipeline(2, max_steps_in_flight=1)
    request = make_request("a", [1, 2, 3, 4, 5], 6)
    pipeline.add(request)
    for _ in range(3):
        pipeline.plan()
        pipeline.land()
    scheduler = pipeline.scheduler
    scheduler.books.preempt(scheduler.books.running[0])
    drawn = list(pipeline.tokens["a"])
    (plan,) = pipeline.plan()
    assert plan.new[0].token_ids == [1, 2, 3, 4, 5, *drawn]
    assert rows(plan) == [(4, 4, True)], "a prefix hit"
    pipeline.land()
    (plan,) = pipeline.plan()
    assert rows(plan) == [(8, 1, True)]
    list(pipeline.plans())
    assert pipeline.tokens["a"] == expected_output(request)


def test_abort_with_several_chunks_in_flight_keeps_the_blocks_until_the_last_lands():
    pipeline = Pipeline(4)
    pool = pipeline.scheduler.cache.pool
    pipeline.add(make_request("a", prompt(1000), 5))
    assert len(pipeline.plan()) == 5
    assert pipeline.scheduler.abort("a").finish_reason == "abort"
    for _ in range(5):
        assert pool.num_free < pool.num_blocks
        pipeline.land()
    assert pool.num_free == pool.num_blocks and not pipeline.scheduler.num_in_flight


def test_a_victim_with_several_chunks_in_flight_is_drained_and_loses_nothing():
    requests = [make_request("first", [9, 8], 120), make_request("victim", prompt(400, 8), 5)]
    pipeline = Pipeline(3, num_blocks=102, max_num_batched_tokens=9)
    pipeline.add(*requests)
    drained = []
    while pipeline.scheduler.num_open:
        pipeline.plan()
        drained += [each.num_in_flight for each in pipeline.scheduler.books.running if each.draining]
        pipeline.land()
    assert drained == [3, 2, 1] and pipeline.scheduler.stats().num_preemptions
    assert pipeline.tokens == {request.id: expected_output(request) for request in requests}


STEP = stage_times.linear(0.005, 0.0002)


@pytest.mark.parametrize("host_s", [0.0005, 0.004])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_decoding_requests_keep_every_stage_busy(num_stages, host_s):
    """Also where the host takes half as long as a stage: tokens do not go by it."""
    scheduler = Pipeline(num_stages).scheduler
    times = stage_times.run(scheduler, [(0, make_request(i, [i, 2], 64)) for i in range(32)], STEP, host_s)
    busy = [round(each, 3) for each in times.utilisation]
    print(f"32 decoding on {num_stages} stages, {host_s * 1e3} ms of host: {busy} busy")
    assert min(times.utilisation) >= 0.93


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_one_prompt_in_m_batches_keeps_stages_as_busy_as_can_be(num_batches, num_stages):
    scheduler = Pipeline(num_stages, max_num_batched_tokens=MIN_CHUNK_TOKENS).scheduler
    request = make_request("a", prompt(num_batches * MIN_CHUNK_TOKENS), 1)
    times = stage_times.run(scheduler, [(0, request)], STEP)
    best = stage_times.ideal(num_batches, num_stages)
    print(f"{num_batches} batches on {num_stages} stages: {times.utilisation[0]:.3f} of {best:.3f}")
    assert len(times.steps) == num_batches
    assert times.utilisation == pytest.approx([best] * num_stages)
