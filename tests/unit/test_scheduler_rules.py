"""The scheduler's rules one by one, with a simulated worker."""

from __future__ import annotations

import pytest
from simulated import SimulatedWorker, expected_output, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.engine.limits import Limits
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import INVALID_TOKEN, SamplingParams, StepResult

BLOCK = 4


def make(num_blocks=32, **limits):
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}
    return Scheduler(Limits(**(defaults | limits)), CacheManager(num_blocks, BLOCK))


def step(scheduler, worker):
    plan = scheduler.schedule()
    return plan, scheduler.update(worker.run(plan))


def test_decodes_come_before_chunks_in_one_step():
    scheduler, worker = make(max_num_batched_tokens=6), SimulatedWorker(32, BLOCK, 8)
    scheduler.add(make_request("short", [1, 2], 9))
    step(scheduler, worker)
    scheduler.add(make_request("long", list(range(20)), 2))
    plan, _ = step(scheduler, worker)
    assert [(row.count, row.sample) for row in plan.rows] == [(1, True), (5, False)]


def test_a_long_prompt_does_not_stop_decodes():
    scheduler, worker = make(max_num_batched_tokens=6), SimulatedWorker(32, BLOCK, 8)
    scheduler.add(make_request("short", [1, 2], 9))
    step(scheduler, worker)
    scheduler.add(make_request("long", list(range(40)), 2))
    for _ in range(6):
        _, outputs = step(scheduler, worker)
        assert "short" in [output.id for output in outputs]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request("r", [], 1), ["no token"]),
        (make_request("r", [1] * 100, 29), ["100", "29", "128"]),
        (make_request("r", [1, 50], 1), ["vocabulary", "50"]),
        (make_request("r", [1, -1], 1), ["vocabulary"]),
        (make_request("r", [1], 1, logit_bias={50: 1.0}), ["logit_bias", "50"]),
    ],
)
def test_refusals_name_what_was_asked_and_what_there_is(request_, words):
    output = make(vocab_size=50).add(request_)
    assert output.finish_reason == "error"
    assert all(word in output.error for word in words)


def test_what_cannot_fit_alone_is_refused():
    scheduler = make(num_blocks=4)
    assert "4" in scheduler.add(make_request("r", [1] * 10, 8)).error
    assert scheduler.add(make_request("fits", [1] * 10, 7)) is None


def test_a_full_queue_and_a_used_id_are_refused():
    scheduler = make(max_queue=2)
    assert scheduler.add(make_request("a", [1], 1)) is None
    assert "in use" in scheduler.add(make_request("a", [1], 1)).error
    scheduler.add(make_request("b", [1], 1))
    assert "full" in scheduler.add(make_request("c", [1], 1)).error


def test_the_last_in_order_is_preempted_and_nothing_is_lost():
    scheduler, worker = make(num_blocks=8), SimulatedWorker(8, BLOCK, 8)
    requests = [make_request(name, [ord(name) % 50] * 9, 14) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    tokens, order = {name: [] for name in "abc"}, []
    while scheduler.num_open:
        _, outputs = step(scheduler, worker)
        scheduler.check_integrity()
        for output in outputs:
            tokens[output.id] += output.token_ids
            order += [output.id] if output.finish_reason else []
    assert scheduler.stats().num_preemptions > 0
    assert order == ["a", "b", "c"]
    assert tokens == {request.id: expected_output(request) for request in requests}


def test_a_lower_priority_number_goes_first():
    scheduler, worker = make(max_num_seqs=1), SimulatedWorker(32, BLOCK, 1)
    for name, priority in (("late", 5), ("early", 1), ("middle", 3)):
        scheduler.add(make_request(name, [1, 2, 3], 1, priority=priority))
    order = [step(scheduler, worker)[1][0].id for _ in range(3)]
    assert order == ["early", "middle", "late"]


def test_the_head_of_the_queue_is_not_overtaken():
    scheduler, worker = make(num_blocks=6), SimulatedWorker(6, BLOCK, 8)
    scheduler.add(make_request("a", [1] * 12, 8))
    step(scheduler, worker)
    scheduler.add(make_request("big", [2] * 15, 2))
    scheduler.add(make_request("small", [3], 1))
    plan, _ = step(scheduler, worker)
    assert len(plan.rows) == 1, "small would fit, but big came first"


def test_abort_with_a_step_in_flight_keeps_the_blocks_until_it_lands():
    scheduler, worker = make(num_blocks=4, max_steps_in_flight=2), SimulatedWorker(4, BLOCK, 8)
    scheduler.add(make_request("a", [1] * 6, 5))
    result = worker.run(scheduler.schedule())
    assert scheduler.abort("a").finish_reason == "abort"
    assert scheduler.abort("a") is None
    assert scheduler.cache.pool.num_free == 2
    assert scheduler.update(result) == []
    assert scheduler.cache.pool.num_free == 4
    scheduler.check_integrity()


def test_no_step_is_planned_past_max_tokens():
    scheduler = make(max_steps_in_flight=3)
    worker = SimulatedWorker(32, BLOCK, 8)
    scheduler.add(make_request("a", [1, 2, 3], 2))
    results = [worker.run(scheduler.schedule()), worker.run(scheduler.schedule())]
    assert scheduler.schedule() is None
    assert [o.finish_reason for result in results for o in scheduler.update(result)] == [None, "length"]


def test_blocks_are_published_only_when_the_result_is_in():
    scheduler, worker = make(max_steps_in_flight=2), SimulatedWorker(32, BLOCK, 8)
    scheduler.add(make_request("a", [1] * 9, 2))
    result = worker.run(scheduler.schedule())
    scheduler.add(make_request("b", [1] * 9, 2))
    plan = scheduler.schedule()
    assert plan.new[0].slot != 0 and plan.rows[-1].start == 0, "b must not read what a has not written"
    results = [result, worker.run(plan)]
    for each in results:
        scheduler.update(each)
    scheduler.add(make_request("c", [1] * 9, 1))
    plan = scheduler.schedule()
    assert plan.rows[-1].start == 8


def test_a_result_out_of_turn_is_an_error():
    scheduler, worker = make(max_steps_in_flight=2), SimulatedWorker(32, BLOCK, 8)
    scheduler.add(make_request("a", [1, 2, 3], 5))
    worker.run(scheduler.schedule())
    with pytest.raises(ValueError, match="oldest"):
        scheduler.update(StepResult(step=1, token_ids=[3]))
    with pytest.raises(ValueError, match="2 tokens"):
        scheduler.update(StepResult(step=0, token_ids=[3, 4]))


def test_logits_that_are_not_finite_end_their_request_only():
    scheduler, worker = make(max_steps_in_flight=2), SimulatedWorker(32, BLOCK, 8)
    for name in "ab":
        scheduler.add(make_request(name, [ord(name) % 50] * 5, 3))
    first, second = worker.run(scheduler.schedule()), worker.run(scheduler.schedule())
    bad = StepResult(step=0, token_ids=[INVALID_TOKEN, first.token_ids[1]])
    outputs = scheduler.update(bad)
    assert [(o.id, o.finish_reason) for o in outputs] == [("a", "error"), ("b", None)]
    assert "finite" in outputs[0].error and not outputs[0].token_ids
    assert [o.id for o in scheduler.update(second)] == ["b"]
    scheduler.check_integrity()


def test_cached_tokens_count_once_also_after_preemption():
    scheduler, worker = make(), SimulatedWorker(32, BLOCK, 8)
    scheduler.add(make_request("a", [7] * 12, 1))
    step(scheduler, worker)
    scheduler.add(make_request("b", [7] * 12, 3))
    _, outputs = step(scheduler, worker)
    assert (outputs[0].num_cached_tokens, outputs[0].num_prompt_tokens) == (8, 12)
    scheduler.books.preempt(scheduler.books.running[0])
    while scheduler.num_open:
        _, outputs = step(scheduler, worker)
        assert outputs[0].num_cached_tokens == 8
    assert scheduler.stats().cached_tokens == 8 and scheduler.stats().prompt_tokens == 24


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("min_tokens", 9), ("temperature", -1.0), ("temperature", float("nan")),
        ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("min_p", 2.0), ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0), ("frequency_penalty", -3.0), ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}), ("seed", 2**64), ("logprobs", -1),
    ],
)  # fmt: skip
def test_sampling_parameters_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**({"max_tokens": 4} | {name: value}))
