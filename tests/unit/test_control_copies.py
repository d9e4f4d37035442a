"""Results of copies over the control plane: those of all ranks come in, and none is left for the next engine.

Rank 0 is here, with a worker that only answers; the others run control_ranks.py.
"""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from control_harness import HOUSE, SOON_S, Ranks, ranks_in

from ds_serve.messages import CopyResult, Row, StepPlan, StepResult
from ds_serve.parallel.control import RankFailure
from ds_serve.worker.local import LeadRank, LocalRank

BAD_STEP = 1000
ROWS = [Row(slot=0, start=0, count=1, sample=True)]


@dataclass
class Step:
    """A launched step."""

    result: StepResult | None

    def finish(self) -> StepResult | None:
        return self.result


class Worker:
    """Copies on a thread of its own, which waits for free."""

    runs_ahead = False

    def __init__(self, deliver, fail, samples: bool = True) -> None:
        self._samples = samples
        self.free, self.closed = threading.Event(), False
        self._deliver, self._fail = deliver, fail
        self._copies = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def launch(self, plan: StepPlan) -> Step | None:
        for kind, pairs in (("load", plan.loads), ("store", plan.stores)):
            if pairs:
                self._copies.put(CopyResult(rank=0, step=plan.step, kind=kind))
        return Step(StepResult(step=plan.step) if self._samples else None) if plan.rows else None

    def close(self) -> None:
        self._copies.put(None)
        self._thread.join()
        self.closed = True

    def _run(self) -> None:
        try:
            while (result := self._copies.get()) is not None:
                assert self.free.wait(SOON_S)
                if result.step == BAD_STEP:
                    raise ValueError("no such block")
                self._deliver(result)
        except ValueError as error:
            self._fail(error)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(tp, pp): ranks that have joined, and rank 0's LeadRank."""
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    with ExitStack() as stack:

        def start(tp: int, pp: int) -> tuple[Ranks, LeadRank]:
            monkeypatch.setenv("LOCAL_SIZE", str(tp * pp))
            ranks = stack.enter_context(ranks_in(tmp_path, tp, pp))
            ranks.start(*range(1, tp * pp))
            ranks.lead().join(SOON_S)
            ranks.build()
            return ranks, lead(ranks)

        yield start


def lead(ranks: Ranks) -> LeadRank:
    samples = ranks.controller.place.samples
    return LeadRank(lambda progress, *report: Worker(*report, samples), ranks.controller)


def test_each_rank_answers_for_its_loads_and_for_its_stores(start):
    _, rank = start(tp=2, pp=2)
    rank.worker.free.set()
    rank.submit(StepPlan(step=1, loads=[(9, 1), (9, 7), (9, 3)]))
    rank.submit(StepPlan(step=2, rows=ROWS, stores=[(1, 9)]))
    found = [rank.collect() for _ in range(9)]
    [step] = [each for each in found if isinstance(each, StepResult)]
    assert step.step == 2
    copies = {(each.step, each.kind, each.rank): each for each in found if isinstance(each, CopyResult)}
    assert set(copies) == {(1, "load", at) for at in range(4)} | {(2, "store", at) for at in range(4)}
    assert [copies[1, "load", at].failed for at in range(4)] == [[], [0], [], [2]]
    assert copies[1, "load", 3].seconds == 0.5
    rank.close()
    assert rank.worker.closed


def test_close_waits_for_copies_of_all_ranks_and_leaves_no_result(start):
    ranks, rank = start(tp=2, pp=1)
    first = rank.worker
    for step in range(1, 51):
        rank.submit(StepPlan(step=step, rows=ROWS if step % 2 else [], loads=[(1, 0)], stores=[(0, 1)]))
    threading.Timer(0.3, first.free.set).start()
    rank.close()
    assert first.closed
    assert ranks.controller.results.empty()
    ranks.build()
    rank = lead(ranks)  # the next engine's first result is its own worker
    rank.worker.free.set()
    assert rank.worker is not first
    rank.submit(StepPlan(step=1, rows=ROWS))
    assert rank.collect() == StepResult(step=1)
    rank.close()
    ranks.controller.check()


def test_an_error_of_copies_on_rank_0_is_told_as_a_steps_is(start):
    ranks, rank = start(tp=2, pp=1)
    rank.worker.free.set()
    rank.submit(StepPlan(step=BAD_STEP, stores=[(0, 1)]))
    with pytest.raises(RankFailure, match=r"^rank 0 \(stage 0, tensor 0\): ValueError: no such block"):
        for _ in range(3):
            rank.collect()
    rank.close()


def test_one_rank_alone_collects_both_kinds_and_the_error():
    rank = LocalRank(lambda progress, *report: Worker(*report))
    rank.worker.free.set()
    rank.submit(StepPlan(step=1, stores=[(0, 1)]))
    assert rank.collect() == CopyResult(rank=0, step=1, kind="store")
    rank.submit(StepPlan(step=2, rows=ROWS))
    assert rank.collect() == StepResult(step=2)
    rank.submit(StepPlan(step=BAD_STEP, loads=[(0, 1)]))
    with pytest.raises(ValueError, match="no such block"):
        rank.collect()
    rank.close()
    assert rank.worker.closed
