"""The scheduler against simulated workers: random arrivals, lengths, aborts, priorities, pins, sizes of both
tiers, numbers of stages and ranks, failing copies, and moments at which results come back."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import cycle
from math import inf
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import VOCAB, SimulatedWorker, Tiers, expected_output, expected_prompt_logprobs, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.engine import limits as limits_module
from ds_serve.engine.limits import Limits
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import Request

BLOCK = 4


@dataclass
class Workload:
    """What is served, on what, and when what happens. Each list is gone through again and again.

    arrivals    requests that come before each turn
    aborts      turn -> the request that is aborted in it; unpins: turn -> the cache key that is released
    spoiler     of so many turns one aborts a request whose prefix is being loaded, if there is one; 0: none
    moments     in each turn: steps planned at most, and results taken in. (9, 1) is the loop
    luck        when ranks make their copies, which of these fail, and when the engine learns of it
    pace        copies in a turn, on average
    """

    num_blocks: int
    limits: Limits
    requests: list[Request]
    arrivals: list[int]
    aborts: dict[int, int] = field(default_factory=dict)
    unpins: dict[int, str] = field(default_factory=dict)
    spoiler: int = 0
    moments: list[tuple[int, int]] = field(default_factory=lambda: [(9, 1)])
    luck: int = 0
    failure_rate: float = 0.0
    pace: float = 1.0
    num_host_blocks: int = 0
    store_zone: int = 0
    max_pinned_blocks: int = 0
    prefix_caching: bool = True
    windows: tuple[int, ...] = (0,)

    @property
    def tokens_ahead(self) -> int:
        return self.limits.max_num_batched_tokens * self.limits.max_steps_in_flight

    def cache(self) -> CacheManager:
        return CacheManager(
            self.num_blocks,
            BLOCK,
            prefix_caching=self.prefix_caching,
            num_host_blocks=self.num_host_blocks,
            store_zone=self.store_zone,
            max_pinned_blocks=self.max_pinned_blocks,
            windows=self.windows,
            tokens_ahead=self.tokens_ahead,
        )


TOKENS = st.integers(0, VOCAB - 1)


@st.composite
def any_requests(draw):
    prefixes = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=3))
    requests = []
    for index in range(draw(st.integers(1, 14))):
        own = draw(st.lists(TOKENS, min_size=1, max_size=24))
        prompt = (draw(st.sampled_from(prefixes)) if draw(st.booleans()) else []) + own
        max_tokens = draw(st.integers(1, 16))
        cache_key = draw(st.sampled_from(["", "", "k", "l"]))
        requests.append(
            make_request(
                index,
                prompt,
                max_tokens,
                min_tokens=draw(st.integers(0, max_tokens)),
                eos_token_ids=tuple(draw(st.sets(TOKENS, max_size=4))),
                ignore_eos=draw(st.booleans()),
                priority=draw(st.integers(0, 2)),
                salt=draw(st.sampled_from(["", "b"])),
                cache_key=cache_key,
                prompt_logprobs=None if cache_key else draw(st.sampled_from([None, None, 0, 2])),
                cache_ttl=float(draw(st.integers(1, 200))),
                pin=draw(st.sampled_from(["hint", "must"])),
            )
        )
    return requests


@st.composite
def recurring_requests(draw):
    """A few long prefixes that come again and again, as chats do, with short questions and answers."""
    begin, others = list(range(9)), draw(st.integers(3, 7))
    prefixes = [begin[: 3 * (each % 4)] + [30 + each] * (9 + 4 * (each % 3)) for each in range(others)]
    chosen = draw(st.lists(st.sampled_from(prefixes), min_size=10, max_size=30))
    priority, max_tokens = (
        draw(st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        draw(st.sampled_from([2, 9, 18])),
    )
    keys = draw(st.lists(st.sampled_from(["", "", "k", "l"]), min_size=1, max_size=4))
    return [
        make_request(
            index,
            [*prefix, *[index] * (1 + index % 3)],
            1 + 7 * index % max_tokens,
            priority=priority[index % len(priority)],
            cache_key=keys[index % len(keys)],
            cache_ttl=20.0,
        )
        for index, prefix in enumerate(chosen)
    ]


@st.composite
def workloads(draw, max_overtaken=4):
    is_recurring = draw(st.booleans())
    requests = draw(recurring_requests() if is_recurring else any_requests())
    num_blocks = draw(st.integers(8, 12) if is_recurring else st.integers(4, 24))
    longest = num_blocks * BLOCK
    num_stages = draw(st.integers(1, 4))
    limits = Limits(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_model_len=draw(st.sampled_from([longest, longest + 9])),
        max_steps_in_flight=draw(st.sampled_from([num_stages, 1, 2, 3, num_stages + 1])),
        vocab_size=VOCAB,
        num_stages=num_stages,
        num_ranks=num_stages * draw(st.integers(1, 4 // num_stages)),
        copy_s_per_block=draw(st.sampled_from([0.0, 0.0, 1.0])),
        prefill_s_per_token=draw(st.sampled_from([1.0, 0.1])),
        audit_share=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        max_overtaken=max_overtaken,
        max_scored_tokens=draw(st.sampled_from([256, 1, 5])),
    )
    some = st.tuples(st.sampled_from([1, 2, 9]), st.integers(0, 3))
    return Workload(
        num_blocks,
        limits,
        requests,
        arrivals=draw(st.lists(st.integers(0, 4), min_size=1, max_size=8) | st.just([1, 0, 0, 0])),
        aborts=draw(st.dictionaries(st.integers(0, 40), st.integers(0, len(requests) - 1), max_size=5)),
        unpins=draw(st.dictionaries(st.integers(0, 30), st.sampled_from("kl"), max_size=3)),
        spoiler=draw(st.sampled_from([0, 0, 0, 3])),
        moments=draw(st.lists(some, min_size=1, max_size=6) | st.just([(9, 1)])),
        luck=draw(st.integers(0, 999)),
        failure_rate=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        pace=draw(st.sampled_from([2.0, 0.1, 0.1, 9.0])),
        num_host_blocks=draw(st.sampled_from([64, 16, 6, 1, 0])),
        store_zone=draw(st.integers(1, num_blocks)),
        max_pinned_blocks=draw(st.integers(0, num_blocks // 2)),
        prefix_caching=is_recurring or draw(st.booleans()),
    )


class Simulation:
    """Runs a workload to its end: outputs by request id, the scheduler and the worker."""

    def __init__(self, load: Workload) -> None:
        self.load, limits = load, load.limits
        self.turn = 0
        self.scheduler = Scheduler(limits, load.cache(), clock=lambda: 1.0 + self.turn)
        self.worker = SimulatedWorker(
            load.num_blocks,
            BLOCK,
            limits.max_num_seqs,
            limits.num_stages,
            limits.num_ranks,
            load.num_host_blocks,
            load.windows,
        )
        self.outputs = {request.id: [] for request in load.requests}
        self.results: deque = deque()  # of steps
        self.copied: list = []  # what ranks have said of copies, not known to the engine
        self.luck = Random(load.luck)

    def run(self) -> Simulation:
        load, scheduler, pending = self.load, self.scheduler, deque(self.load.requests)
        moments = cycle(load.moments)
        # Small chunks, so that steps are cut.
        with patch.object(limits_module, "MIN_CHUNK_TOKENS", 1 + load.num_blocks % 8):
            while pending or scheduler.num_open or scheduler.num_in_flight or scheduler.num_copying:
                self._arrive(pending)
                self.turn += 1
                assert self.turn < 5000, "no progress"
                most_plans, num_results = next(moments)
                is_stuck = not self._plan(most_plans)
                self._copy(is_stuck)
                for _ in range(min(num_results or int(is_stuck), len(self.results))):
                    self._take(scheduler.update(self.results.popleft()))
        return self

    def _arrive(self, pending) -> None:
        load, scheduler = self.load, self.scheduler
        for _ in range(load.arrivals[self.turn % len(load.arrivals)] if self.turn < 40 else len(pending)):
            if pending:
                self._take([scheduler.add(pending.popleft())])
        if self.turn in load.aborts:
            self._take([scheduler.abort(str(load.aborts[self.turn]))])
        if load.spoiler and self.turn % load.spoiler == 0:
            loading = [each.request.id for each in scheduler.books.running if each.is_loading]
            self._take([scheduler.abort(name) for name in loading[:1]])
        if self.turn in load.unpins:
            scheduler.unpin(load.unpins[self.turn], "")

    def _plan(self, most_plans: int) -> int:
        scheduler, num_plans = self.scheduler, 0
        while num_plans < most_plans and scheduler.can_plan and (plan := scheduler.schedule()) is not None:
            assert plan.rows or plan.loads or plan.stores, "an empty plan"
            result = self.worker.run(plan)
            if result is not None:
                self.results.append(result)
            num_plans += 1
            scheduler.check_integrity()
        assert len(self.results) == scheduler.num_in_flight <= self.load.limits.max_steps_in_flight
        in_flight = self.results or self.worker.copies or self.copied
        assert in_flight or not scheduler.num_open, "open requests, nothing in flight and nothing to plan"
        return num_plans

    def _copy(self, is_stuck: bool) -> None:
        """Some ranks make their copies, some words of it arrive: at least one where nothing else goes on."""
        luck, copies, pace = self.luck, self.worker.copies, self.load.pace
        is_stuck = is_stuck and self.turn % 3 == 0  # some patience
        for _ in range(round(luck.uniform(0, 2 * pace))):
            if copies:
                each = luck.choice(copies)
                failed = [i for i in range(len(each.pairs)) if luck.random() < self.load.failure_rate]
                self.copied.append(self.worker.copy(each, failed))
        if is_stuck and copies and not self.copied and not self.results:
            self.copied.append(self.worker.copy(copies[0]))
        for _ in range(max(is_stuck, round(luck.uniform(0, 2 * pace)))):
            if self.copied:
                self.scheduler.copied(self.copied.pop(luck.randrange(len(self.copied))))
                self.scheduler.check_integrity()

    def _take(self, outputs) -> None:
        for output in outputs:
            if output is not None:
                self.outputs[output.id].append(output)
        self.scheduler.check_integrity()


@st.composite
def window_workloads(draw):
    """With layers that see a window only: more and longer requests than the pool would hold whole."""
    load = draw(workloads())
    windows = draw(st.sampled_from([(5,), (2,), (9,), (0, 6), (0, 2, 9), (0, 0, 4, 4), (3, 8)]))
    limits = replace(
        load.limits,
        max_num_batched_tokens=draw(st.sampled_from([1, 3, 6, load.limits.max_num_batched_tokens])),
        max_model_len=90,
    )
    num_blocks = len(windows) * draw(st.integers(4, 16))
    load = replace(load, windows=windows, limits=limits, num_blocks=num_blocks)
    return replace(load, num_host_blocks=0, max_pinned_blocks=draw(st.integers(0, num_blocks // 2)))


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_every_request_ends_once_with_the_right_tokens_and_every_block_comes_back(load):
    check_everything(load)


@settings(max_examples=200, deadline=None)
@given(window_workloads())
def test_the_same_where_blocks_are_given_back_when_they_leave_a_window(load):
    check_everything(load)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_blocks", range(18, 38, 2))
def test_with_windows_too_prompts_are_computed_beside_each_other_only_where_both_fit(
    num_blocks, steps_in_flight
):
    """A slow prompt, whose log-probabilities are asked for, and one that could overtake it."""
    slow, fast = make_request("slow", [1] * 40, 1, prompt_logprobs=0), make_request("fast", [2] * 40, 1)
    limits = Limits(
        max_num_seqs=2,
        max_num_batched_tokens=8 // steps_in_flight,
        max_model_len=90,
        max_scored_tokens=2,
        max_steps_in_flight=steps_in_flight,
    )
    load = Workload(num_blocks, limits, [slow, fast], arrivals=[2], windows=(0, 6))
    simulation = check_everything(load)
    assert simulation.scheduler.stats().num_preemptions == 0
    (_, began, _), (_, _, ended) = (simulation.outputs[name][-1].times for name in ("fast", "slow"))
    most = load.cache().windows.most_blocks(40)
    assert most == 10 + 5
    if num_blocks >= 2 * most + 2:
        assert began == 2.0, "both fit, and a block of each group to go on with"
    elif num_blocks < 2 * most - 4:
        assert began >= ended


def check_everything(load):
    simulation = Simulation(load).run()
    scheduler, outputs = simulation.scheduler, simulation.outputs

    assert simulation.worker.max_step_tokens <= load.limits.max_num_batched_tokens
    assert simulation.worker.max_scored <= load.limits.max_scored_tokens
    scheduler.cache.expire(inf)
    assert scheduler.cache.pool.num_free == load.num_blocks
    scheduler.check_integrity()
    for request in load.requests:
        ends = [output.finish_reason for output in outputs[request.id] if output.finish_reason]
        assert len(ends) == 1 and outputs[request.id][-1].finish_reason == ends[0]
        tokens = [token for output in outputs[request.id] for token in output.token_ids]
        wanted = expected_output(request)
        if ends[0] == "abort":
            assert tokens == wanted[: len(tokens)]
        elif ends[0] == "error":
            assert not tokens
            total = len(request.prompt_token_ids) + request.params.max_tokens
            needed = load.cache().windows.most_blocks(total - 1)
            is_too_long = total > load.limits.max_model_len or needed > load.num_blocks
            error = outputs[request.id][-1].error
            assert is_too_long or (request.cache_key and request.pin == "must" and "pinned" in error)
        else:
            assert tokens == wanted
            scores = [output.prompt_logprobs for output in outputs[request.id] if output.prompt_logprobs]
            assert scores == list(filter(None, [expected_prompt_logprobs(request)]))
            assert (ends[0] == "stop") == (outputs[request.id][-1].stop_token_id is not None)
    reasons = Counter(output.finish_reason for all_ in outputs.values() for output in all_)
    stats, last = scheduler.stats(), [all_[-1] for all_ in outputs.values()]
    num_refused = sum(output.times == (0.0, 0.0, 0.0) for output in last)
    assert stats.num_finished == sum(reasons[r] for r in ("stop", "length", "abort", "error")) - num_refused
    assert stats.output_tokens == sum(len(output.token_ids) for all_ in outputs.values() for output in all_)
    assert stats.cached_tokens == sum(output.num_cached_tokens for output in last)
    assert stats.cached_tokens_host == sum(output.num_host_tokens for output in last)
    assert all(output.num_host_tokens <= output.num_cached_tokens for output in last)
    assert stats.audit_max_difference == 0.0
    return simulation


@settings(max_examples=60, deadline=None)
@given(workloads(max_overtaken=0))
def test_without_overtaking_equal_priorities_start_in_order_of_arrival(load):
    load = replace(load, num_host_blocks=0, aborts={})  # nobody waits for another's load
    outputs = Simulation(load).run().outputs
    started = [
        outputs[request.id][0].times[1]
        for request in load.requests
        if request.priority == 1 and outputs[request.id][0].times[1]
    ]
    assert started == sorted(started)


@settings(max_examples=100, deadline=None)
@given(
    num_ranks=st.integers(1, 3),
    length=st.integers(9, 27),
    late=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    failed=st.sets(st.integers(0, 4), max_size=2),
    abort_at=st.integers(0, 60),
)
def test_a_loading_sequence_may_be_chosen_as_a_victim_at_any_moment(
    num_ranks, length, late, failed, abort_at
):
    """The one before it needs more and more blocks while its ranks copy late, each in a turn of its own."""
    tiers, prompt = Tiers(num_ranks=num_ranks), [1] * 5 + [11] * 16
    tiers.wash(prompt)
    first, second = make_request("first", [7] * length, 20), make_request("second", prompt, 4)
    tiers.add(first)
    tiers.plan()
    tiers.land()
    tiers.add(second)
    for turn in range(41):
        tiers.plan()
        if turn == abort_at and (output := tiers.scheduler.abort("second")):
            tiers.outputs["second"].append(output)
        for rank in range(num_ranks):
            if turn >= late[rank]:
                tiers.copy(ranks=[rank], failed=failed if turn == late[rank] else ())
        if tiers.results:
            tiers.land()
    tiers.run()
    assert tiers.tokens("first") == expected_output(first)
    tokens = tiers.tokens("second")
    assert tokens == expected_output(second)[: len(tokens)]
    assert len(tokens) == 4 or tiers.outputs["second"][-1].finish_reason == "abort"
    assert tiers.cache.pool.num_free == tiers.cache.num_blocks
