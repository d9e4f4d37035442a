"""The scheduler against simulated workers: random arrivals, lengths, aborts, priorities, pool sizes, numbers
of pipeline stages, and moments at which results come back."""

from __future__ import annotations

from collections import Counter, deque
from itertools import cycle
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import VOCAB, SimulatedWorker, expected_output, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.engine import limits as limits_module
from ds_serve.engine.limits import Limits
from ds_serve.engine.scheduler import Scheduler

BLOCK = 4


@st.composite
def workloads(draw):
    num_blocks = draw(st.integers(4, 24))
    longest = num_blocks * BLOCK
    prefixes = draw(
        st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=3)
    )
    requests = []
    for index in range(draw(st.integers(1, 14))):
        own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24))
        prompt = (draw(st.sampled_from(prefixes)) if draw(st.booleans()) else []) + own
        max_tokens = draw(st.integers(1, 16))
        requests.append(
            make_request(
                index,
                prompt,
                max_tokens,
                min_tokens=draw(st.integers(0, max_tokens)),
                eos_token_ids=tuple(draw(st.sets(st.integers(0, VOCAB - 1), max_size=4))),
                ignore_eos=draw(st.booleans()),
                priority=draw(st.integers(0, 2)),
                salt=draw(st.sampled_from(["", "b"])),
            )
        )
    num_stages = draw(st.integers(1, 4))
    limits = Limits(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_model_len=draw(st.sampled_from([longest, longest + 9])),
        max_steps_in_flight=draw(st.sampled_from([num_stages, 1, 2, 3, num_stages + 1])),
        vocab_size=VOCAB,
        num_stages=num_stages,
    )
    # Before each step: which requests arrive, which are aborted.
    arrivals = draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    aborts = draw(st.dictionaries(st.integers(0, 30), st.integers(0, len(requests) - 1), max_size=5))
    # In each turn: how many steps are planned at most, and how many results come back. (9, 1) is the loop.
    some = st.tuples(st.sampled_from([1, 2, 9]), st.integers(0, 3))
    moments = draw(st.lists(some, min_size=1, max_size=6) | st.just([(9, 1)]))
    return num_blocks, limits, requests, arrivals, aborts, moments


def drive(num_blocks, limits, requests, arrivals, aborts, moments, prefix_caching=True):
    """Runs everything to its end; returns the outputs by request id, the scheduler and the worker."""
    with patch.object(limits_module, "MIN_CHUNK_TOKENS", 1 + num_blocks % 8):  # small, so that steps are cut
        return _drive(num_blocks, limits, requests, arrivals, aborts, cycle(moments), prefix_caching)


def _drive(num_blocks, limits, requests, arrivals, aborts, moments, prefix_caching):
    scheduler = Scheduler(limits, CacheManager(num_blocks, BLOCK, prefix_caching=prefix_caching))
    worker = SimulatedWorker(num_blocks, BLOCK, limits.max_num_seqs, limits.num_stages)
    outputs = {request.id: [] for request in requests}
    pending, results, turn = deque(requests), deque(), 0

    def take(output):
        if output is not None:
            outputs[output.id].append(output)

    while pending or scheduler.num_open or scheduler.num_in_flight:
        for _ in range(arrivals[turn % len(arrivals)] if turn < 40 else len(pending)):
            if pending:
                take(scheduler.add(pending.popleft()))
        if turn in aborts:
            take(scheduler.abort(str(aborts[turn])))
        turn += 1
        assert turn < 5000, "no progress"
        most_plans, num_results = next(moments)
        num_plans = 0
        while num_plans < most_plans and scheduler.can_plan and (plan := scheduler.schedule()) is not None:
            results.append(worker.run(plan))
            num_plans += 1
            scheduler.check_integrity()
        assert len(results) <= limits.max_steps_in_flight
        assert results or not scheduler.num_open, "open requests, nothing in flight and nothing to plan"
        for _ in range(min(num_results or int(not num_plans), len(results))):
            for output in scheduler.update(results.popleft()):
                take(output)
            scheduler.check_integrity()
    return outputs, scheduler, worker


@settings(max_examples=300, deadline=None)
@given(workloads(), st.booleans())
def test_every_request_ends_once_with_the_right_tokens_and_every_block_comes_back(workload, prefix_caching):
    num_blocks, limits, requests, *_ = workload
    outputs, scheduler, worker = drive(*workload, prefix_caching=prefix_caching)

    assert worker.max_step_tokens <= limits.max_num_batched_tokens
    assert scheduler.cache.pool.num_free == num_blocks
    scheduler.cache.check_integrity()
    for request in requests:
        ends = [output.finish_reason for output in outputs[request.id] if output.finish_reason]
        assert len(ends) == 1 and outputs[request.id][-1].finish_reason == ends[0]
        tokens = [token for output in outputs[request.id] for token in output.token_ids]
        wanted = expected_output(request)
        if ends[0] == "abort":
            assert tokens == wanted[: len(tokens)]
        elif ends[0] == "error":
            total = len(request.prompt_token_ids) + request.params.max_tokens
            assert not tokens
            assert total > limits.max_model_len or total - 1 > num_blocks * BLOCK
        else:
            assert tokens == wanted
            assert (ends[0] == "stop") == (outputs[request.id][-1].stop_token_id is not None)
    reasons = Counter(output.finish_reason for all_ in outputs.values() for output in all_)
    assert scheduler.stats().num_finished == sum(reasons[r] for r in ("stop", "length", "abort"))


@settings(max_examples=100, deadline=None)
@given(workloads())
def test_equal_priorities_start_in_order_of_arrival(workload):
    num_blocks, limits, requests, arrivals, _, moments = workload
    outputs, *_ = drive(num_blocks, limits, requests, arrivals, {}, moments)
    started = [
        outputs[request.id][0].times[1]
        for request in requests
        if request.priority == 1 and outputs[request.id][0].finish_reason != "error"
    ]
    assert started == sorted(started)
