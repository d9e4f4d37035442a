"""The engine's loop and its local front, with a simulated worker in place of the ranks."""

from __future__ import annotations

import queue
import threading
from collections import deque

import pytest
from simulated import VOCAB, SimulatedWorker, expected_output, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.engine import local
from ds_serve.engine.limits import Limits
from ds_serve.engine.local import EngineDeadError, LocalEngine
from ds_serve.engine.loop import Closed, EngineLoop
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import Abort, EngineInfo, Output, Stats, StatsQuery

NUM_HOST_BLOCKS = 64
INFO = EngineInfo(
    model="none", max_model_len=64, vocab_size=VOCAB, block_size=4, num_blocks=32, device="cpu", dtype="int"
)


class SimulatedRanks:
    """Steps' results in order, copies in between. A gate holds them back, a fault is raised."""

    def __init__(self, num_stages: int = 1, num_ranks: int = 1) -> None:
        self.worker = SimulatedWorker(32, 4, 8, num_stages, num_ranks, NUM_HOST_BLOCKS)
        self.num_stages = num_stages
        self.results = deque()
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.closed = False

    def submit(self, plan):
        result = self.worker.run(plan)
        if result is not None:
            self.results.append(result)

    def collect(self):
        self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        copies = self.worker.copies
        if copies and (len(copies) % 3 or not self.results):
            return self.worker.copy(copies[-1])
        return self.results.popleft()

    def check(self):
        if self.fault is not None:
            raise self.fault

    def busy_s(self):
        return [0.5] * self.num_stages

    def close(self):
        self.closed = True


@pytest.fixture(
    params=[(1, 1, 0), (3, 3, 0), (1, 2, 16), (3, 3, NUM_HOST_BLOCKS)],
    ids=["one stage", "three stages", "two tiers on two ranks", "two tiers on three stages"],
)
def engine(request, monkeypatch):
    monkeypatch.setattr(local, "IDLE_WAIT_S", 0.05)
    stages, num_ranks, num_host_blocks = request.param
    limits = Limits(8, 16, 64, max_steps_in_flight=max(2, stages), num_stages=stages, num_ranks=num_ranks)
    ranks = SimulatedRanks(stages, num_ranks)
    cache = CacheManager(32, 4, num_host_blocks=num_host_blocks, store_zone=8, max_pinned_blocks=8)
    engine = LocalEngine(Scheduler(limits, cache), ranks, INFO)
    engine.ranks = ranks
    yield engine
    ranks.gate.set()
    engine.close()
    assert ranks.closed
    if ranks.fault is None:
        engine.scheduler.check_integrity()


def collect(outputs: queue.Queue) -> tuple[list[int], str]:
    tokens = []
    while True:
        output = outputs.get(timeout=10)
        tokens += output.token_ids
        if output.finish_reason:
            return tokens, output.finish_reason


def submit(engine, request):
    outputs = queue.Queue()
    engine.submit(request, outputs.put)
    return outputs


def test_many_requests_from_many_threads(engine):
    requests = [make_request(i, [i % VOCAB, 3, 4, 5 + i % 3] * (1 + i % 7), 1 + i % 9) for i in range(60)]
    answers = {}

    def ask(request):
        answers[request.id] = collect(submit(engine, request))

    threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {r.id: (expected_output(r), "length") for r in requests} == answers
    stats = engine.stats()
    assert (stats.num_finished, stats.num_running, stats.num_waiting) == (60, 0, 0)
    for _ in range(100):  # stores of what is evicted next may be under way
        if stats.num_free_blocks < 32:
            stats = engine.stats()
    assert stats.num_free_blocks == 32
    assert bool(stats.stored_blocks) == bool(stats.num_host_blocks)
    assert stats.store_s == 0.5 * stats.num_stores and stats.stored_blocks >= stats.num_stores


def test_prompts_that_come_again_are_found_in_both_tiers(engine):
    prompts = [[index] * 21 for index in range(12)]  # twice the device, all in the larger host
    requests = [
        make_request(f"{index} {turn}", prompts[index], 2) for turn in range(3) for index in range(12)
    ]
    for request in requests:
        assert collect(submit(engine, request)) == (expected_output(request), "length")
    stats = engine.stats()
    assert bool(stats.loaded_blocks) == (stats.num_host_blocks == NUM_HOST_BLOCKS)
    if stats.loaded_blocks:
        assert stats.cached_tokens == 24 * 20, "every prompt's full blocks, each time it comes back"
        assert stats.num_loads and stats.load_s == 0.5 * stats.num_loads


def test_what_a_request_pins_is_unpinned_by_message(engine):
    collect(submit(engine, make_request("a", [1] * 21, 2, cache_key="k", salt="t")))
    assert engine.stats().num_pinned_blocks == 5
    engine.unpin("k", "t")
    assert engine.stats().num_pinned_blocks == 0


def test_abort_ends_once_and_a_late_abort_is_nothing(engine):
    engine.ranks.gate.clear()
    outputs = submit(engine, make_request("a", [1, 2, 3], 50))
    engine.abort("a")
    engine.abort("a")
    engine.abort("never-seen")
    engine.ranks.gate.set()
    assert collect(outputs)[1] == "abort"
    assert engine.stats().num_finished == 1
    assert outputs.empty()


def test_a_request_that_can_never_run_is_answered(engine):
    output = submit(engine, make_request("long", [1] * 60, 20)).get(timeout=10)
    assert output.finish_reason == "error"
    assert "60" in output.error and "20" in output.error and "64" in output.error


def test_a_failing_step_ends_every_request_and_the_engine_says_why(engine):
    engine.ranks.gate.clear()
    outputs = [submit(engine, make_request(i, [1, 2, 3 + i], 9)) for i in range(12)]
    engine.ranks.fault = RuntimeError("device lost")
    engine.ranks.gate.set()
    for each in outputs:
        assert collect(each)[1] == "error"
        assert each.empty()
    with pytest.raises(EngineDeadError, match="device lost"):
        for _ in range(100):
            engine.stats()
    with pytest.raises(EngineDeadError, match="device lost"):
        engine.submit(make_request("z", [1], 1), print)


def test_close_ends_open_requests(engine):
    engine.ranks.gate.clear()
    outputs = submit(engine, make_request("a", [1, 2, 3], 40))
    engine._inbox.put(None)
    engine.ranks.gate.set()
    assert collect(outputs)[1] == "error"


def test_a_rank_that_fails_while_nothing_runs_ends_the_engine(engine):
    assert collect(submit(engine, make_request("a", [1, 2, 3], 4)))[1] == "length"
    engine.ranks.fault = RuntimeError("rank 2 is gone")
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    with pytest.raises(EngineDeadError, match="rank 2 is gone"):
        engine.submit(make_request("b", [1], 1), print)


class ScriptedInbox:
    """Gives one batch of messages a turn, then nothing more while requests are open, then says Closed."""

    def __init__(self, *batches):
        self.batches = deque(batches)
        self.waits = []

    def receive(self, wait):
        self.waits.append(wait)
        if wait and not self.batches:
            raise Closed
        return self.batches.popleft() if self.batches else []


def make_loop(ranks, delivered, *batches, clock=lambda: 0.0, stopwatch=lambda: 0.0, max_steps_in_flight=2):
    limits = Limits(8, 16, 64, max_steps_in_flight=max_steps_in_flight, num_stages=2)
    scheduler = Scheduler(limits, CacheManager(32, 4))
    return EngineLoop(scheduler, ranks, ScriptedInbox(*batches), delivered.extend, clock, stopwatch)


def test_a_request_that_arrives_with_a_failure_is_answered():
    ranks, delivered = SimulatedRanks(2), []
    ranks.fault = RuntimeError("rank 1 is gone")
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        make_loop(ranks, delivered, [make_request("a", [1, 2], 3)]).run()
    assert [(output.id, output.finish_reason) for output in delivered] == [("a", "error")]
    assert "rank 1 is gone" in delivered[0].error and ranks.closed


def test_ranks_that_do_not_close_do_not_hide_why_they_failed():
    class Stuck(SimulatedRanks):
        def close(self):
            raise TimeoutError("no rank answers")

    ranks = Stuck(2)
    with pytest.raises(TimeoutError, match="no rank answers"):
        make_loop(ranks, []).run()
    ranks.fault = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost") as caught:
        make_loop(ranks, [], [make_request("a", [1, 2], 3)]).run()
    assert "no rank answers" in caught.value.__notes__[0]


def test_active_time_counts_while_a_step_is_in_flight():
    delivered, now = [], iter([10.0, 11.0, 20.0, 21.5, 23.0])
    ask = StatsQuery()
    # Two tokens: in flight from 10 to 11 and from 20 to 23, and asked before, within (at 21.5) and after.
    batches = [[ask], [make_request("a", [1, 2], 2)], [], [], [ask]]
    ranks = SimulatedRanks(2)
    loop = make_loop(ranks, delivered, *batches, clock=lambda: next(now), max_steps_in_flight=1)
    turns = iter(range(9))
    collect_one = ranks.collect

    def collect_and_ask():
        if next(turns) == 1:
            loop._answer([ask])
        return collect_one()

    ranks.collect = collect_and_ask
    loop.run()
    stats = [message for message in delivered if isinstance(message, Stats)]
    assert [each.active_s for each in stats] == [0.0, 2.5, 4.0]
    assert all(each.stage_busy_s == [0.5, 0.5] for each in stats)
    assert sum(len(each.token_ids) for each in delivered if isinstance(each, Output)) == 2


def test_the_thread_s_time_is_told_apart_and_sleeping_is_none_of_it():
    delivered, ranks = [], SimulatedRanks(2)
    # A turn reads the watch when it starts, has planned, has a result, and is done; where it slept, also when
    # it wakes up. Two tokens, a turn with nothing to do, a query, and the sleep that ends it all.
    steps = [0, 1, 3, 6, 10, 15, 21, 28]
    idle = [100, 101]
    woken = [200, 1000, 1004]
    last = [5000]
    now = iter([*steps, *idle, *woken, *last])
    batches = [[make_request("a", [1, 2], 2)], [], [], [StatsQuery()]]
    loop = make_loop(ranks, delivered, *batches, stopwatch=lambda: next(now))
    loop.run()
    assert (loop._plan_s, loop._wait_s, loop._update_s) == (1 + 5 + 1 + 4, 2 + 6, 3 + 7)
    (stats,) = [message for message in delivered if isinstance(message, Stats)]
    assert (stats.plan_s, stats.wait_s, stats.update_s) == (7, 8, 10), "the query's own turn is not over"


def test_stores_that_are_due_are_made_and_waited_for_before_the_engine_sleeps():
    ranks, delivered = SimulatedRanks(num_ranks=3), []
    cache = CacheManager(32, 4, num_host_blocks=16, store_zone=32)
    scheduler = Scheduler(Limits(8, 64, 64, num_ranks=3), cache)
    inbox = ScriptedInbox([make_request("a", [1] * 21, 1)])
    EngineLoop(scheduler, ranks, inbox, delivered.extend).run()
    assert cache.num_host_used == 5 and scheduler.stats().stored_blocks == 5
    assert not scheduler.num_copying and not ranks.worker.copies
    # The step; three ranks' stores, one a turn; a turn that finds nothing more to do; then it sleeps.
    assert inbox.waits == [False] * 5 + [True]


def test_an_idle_engine_takes_in_what_is_left_of_copies_of_an_aborted_request():
    ranks, delivered = SimulatedRanks(num_ranks=2), []
    cache = CacheManager(12, 4, num_host_blocks=16, store_zone=12)
    scheduler = Scheduler(Limits(8, 64, 64, num_ranks=2), cache)
    again = make_request("a", [1] * 21, 1)
    batches = [
        [make_request("first", [1] * 21, 1)],
        *[[]] * 6,
        [make_request("wash", [2] * 47, 1)],
        *[[]] * 9,
    ]
    inbox = ScriptedInbox(*batches, [again], [Abort(id="a")])
    EngineLoop(scheduler, ranks, inbox, delivered.extend).run()
    assert delivered[-1].id == "a" and delivered[-1].finish_reason == "abort"
    assert scheduler.stats().loaded_blocks == 5 and cache.pool.num_free == 12
    scheduler.check_integrity()


def test_a_failure_while_a_prefix_is_loaded_ends_its_request():
    ranks, delivered = SimulatedRanks(), []
    cache = CacheManager(12, 4, num_host_blocks=16, store_zone=12)
    scheduler = Scheduler(Limits(8, 64, 64), cache)
    batches = [
        [make_request("first", [1] * 21, 1)],
        *[[]] * 6,
        [make_request("wash", [2] * 47, 1)],
        *[[]] * 9,
    ]
    loop = EngineLoop(
        scheduler, ranks, ScriptedInbox(*batches, [make_request("a", [1] * 21, 1)]), delivered.extend
    )
    submit_one = ranks.submit

    def lose_loads(plan):
        if plan.loads:
            ranks.fault = RuntimeError("copier of rank 0 is gone")
        submit_one(plan)

    ranks.submit = lose_loads
    with pytest.raises(RuntimeError, match="copier of rank 0"):
        loop.run()
    assert (delivered[-1].id, delivered[-1].finish_reason) == ("a", "error")
