"""The engine's loop and its local front, with a simulated worker in place of the ranks."""

from __future__ import annotations

import queue
import threading
from collections import deque

import pytest
from simulated import VOCAB, SimulatedWorker, expected_output, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.engine.limits import Limits
from ds_serve.engine.local import EngineDeadError, LocalEngine
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import EngineInfo

INFO = EngineInfo(
    model="none", max_model_len=64, vocab_size=VOCAB, block_size=4, num_blocks=32, device="cpu", dtype="int"
)


class SimulatedRanks:
    """Results in order; a gate holds them back, a fault makes the next step raise."""

    def __init__(self) -> None:
        self.worker = SimulatedWorker(32, 4, 8)
        self.results = deque()
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.closed = False

    def submit(self, plan):
        self.results.append(self.worker.run(plan))

    def collect(self):
        self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        return self.results.popleft()

    def close(self):
        self.closed = True


@pytest.fixture
def engine():
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, max_steps_in_flight=2)
    ranks = SimulatedRanks()
    engine = LocalEngine(Scheduler(limits, CacheManager(32, 4)), ranks, INFO)
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
    assert stats.num_free_blocks == 32


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
