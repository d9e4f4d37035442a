"""The verdict on evidence, with times as numbers; what an error says of other ranks."""

from __future__ import annotations

import pytest

from ds_serve.messages import Row, StepPlan
from ds_serve.parallel.health import Health, WakingClock, beat_interval, describe
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import Beat, Build, Close, Failure

TIMEOUT_S = 6.0
GLOO = "Connection closed by peer"


def plan(step: int) -> StepPlan:
    return StepPlan(step=step, rows=[Row(slot=0, start=0, count=1)])


class Course:
    """A Health whose ranks beat each second unless told to be silent."""

    def __init__(self, tp: int = 2, pp: int = 2) -> None:
        self.health = Health(Place(0, tp, pp), TIMEOUT_S)
        self.now = 0.0
        self.states = dict.fromkeys(range(tp * pp), (0, 0, "idle"))
        self.silent: set[int] = set()

    def at(self, *states: tuple[int, int, str]) -> None:
        """Each rank's step, attention calls and phase."""
        self.states = dict(enumerate(states))

    def run(self, seconds: float):
        """The verdict and when it fell, or None."""
        end = self.now + seconds
        while self.now < end:
            for rank, (step, num_calls, phase) in self.states.items():
                if rank not in self.silent and self.now % 1 == 0:
                    beat = Beat(
                        rank=rank, step=step, num_calls=num_calls, phase=phase, busy_s=0, pid=1, host=""
                    )
                    self.health.heard(beat, self.now)
            failure = self.health.judge(self.now)
            if failure is not None:
                return str(failure), self.now
            self.now = round(self.now + 0.0625, 4)
        return None


def test_nothing_happens_to_healthy_ranks():
    course = Course()
    assert course.run(100) is None
    assert not course.health.suspicious


@pytest.mark.parametrize("order", [0, 1])
def test_a_death_counts_more_than_errors_of_its_moment(order):
    course = Course()
    course.run(1)
    signs = [
        lambda now: course.health.died(3, "the process died", now),
        lambda now: course.health.failed(Failure(rank=1, reason="odd words"), now),
    ]
    signs[order](course.now)
    signs[1 - order](course.now + 0.05)
    course.health.failed(Failure(rank=2, reason=GLOO, communication=True), course.now)
    verdict, _ = course.run(5)
    assert verdict == "rank 3 (stage 1, tensor 1): the process died"


def test_a_launcher_that_ends_the_others_is_not_the_cause():
    course = Course()
    course.run(1)
    course.health.failed(Failure(rank=3, reason="ValueError: x"), course.now)
    course.health.died(3, "the process died", course.now)  # it said why
    course.health.died(1, "the process died", course.now + 0.2)
    assert course.run(5)[0] == "rank 3 (stage 1, tensor 1): ValueError: x"


def test_of_several_deaths_the_first_counts_and_one_beats_a_lost_connection():
    course = Course()
    course.run(1)
    course.health.lost(2, course.now)
    course.health.died(1, "the process died", course.now + 0.01)
    course.health.died(2, "the process died", course.now + 0.02)
    assert course.run(5)[0] == "rank 2 (stage 1, tensor 0): the process died"


def test_an_error_counts_more_than_what_it_does_to_communication():
    course = Course()
    course.run(1)
    course.health.failed(Failure(rank=0, reason=GLOO, communication=True), course.now)
    assert course.run(0.25) is None
    course.health.failed(Failure(rank=2, reason="ValueError: x"), course.now)
    course.health.failed(Failure(rank=2, reason="a later word"), course.now)
    assert course.run(5)[0] == "rank 2 (stage 1, tensor 0): ValueError: x"


def test_lost_communication_alone_names_who_lost_it():
    course = Course()
    course.run(1)
    course.health.failed(Failure(rank=2, reason=GLOO, communication=True), course.now)
    assert course.run(5)[0] == f"rank 2 (stage 1, tensor 0): {GLOO}"


def test_silence_is_a_failure_after_the_timeout_and_later_while_loading():
    course = Course()
    course.run(10)
    course.silent = {1}
    verdict, when = course.run(60)
    assert verdict == "rank 1 (stage 0, tensor 1): no heartbeat for 6 s"
    assert TIMEOUT_S <= when - 9 <= TIMEOUT_S + 1.0

    course = Course()
    course.at(*4 * [(0, 0, "loading")])
    course.run(10)
    course.silent = {1}
    assert course.run(50) is None
    assert course.run(60)[0] == "rank 1 (stage 0, tensor 1): no heartbeat for 60 s"


def test_silence_that_ends_within_the_grace_is_forgiven():
    course = Course()
    course.run(10)
    course.silent = {1}
    course.run(5.25)  # until 6.25 s after the last beat
    course.silent = set()
    assert course.health.suspicious
    course.health.heard(Beat(rank=1, step=0, num_calls=0, phase="idle", busy_s=0, pid=1, host=""), course.now)
    assert course.run(20) is None
    assert not course.health.suspicious


def stalled(*states) -> tuple[str, str]:
    """Who is named and where it stands, once five steps are in flight."""
    course = Course()
    course.at(*states)
    course.run(3)
    for step in range(1, 6):
        course.health.sent(plan(step))
    began = course.now
    verdict, when = course.run(60)
    assert TIMEOUT_S <= when - began <= TIMEOUT_S + 2.0
    who, where = verdict.split(": no progress for 6 s, ")
    return who, where


def test_a_stall_is_blamed_on_who_computes_the_oldest_step_and_not_on_who_waits():
    named = stalled((6, 2, "compute"), (6, 3, "compute"), (4, 0, "receive"), (5, 1, "compute"))
    assert named == ("rank 3 (stage 1, tensor 1)", "computing step 5 (attention call 1)")


def test_of_those_in_one_step_the_one_furthest_behind():
    named = stalled((5, 4, "compute"), (5, 3, "compute"), (5, 0, "receive"), (5, 0, "receive"))
    assert named == ("rank 1 (stage 0, tensor 1)", "computing step 5 (attention call 3)")


def test_ranks_at_one_point_are_all_named():
    named = stalled((5, 3, "compute"), (5, 3, "compute"), (5, 0, "receive"), (5, 0, "receive"))
    assert named == ("rank 0 (stage 0, tensor 0)", "computing step 5 (attention call 3) (no further: rank 1)")


def test_a_rank_that_took_no_plan_is_named_where_none_computes():
    named = stalled((5, 3, "idle"), (5, 3, "idle"), (5, 0, "receive"), (4, 0, "idle"))
    assert named == ("rank 3 (stage 1, tensor 1)", "idle after step 4")
    named = stalled((5, 3, "idle"), (5, 3, "idle"), (5, 0, "receive"), (5, 0, "receive"))
    assert named == ("rank 0 (stage 0, tensor 0)", "idle after step 5")


@pytest.mark.parametrize("what", ["result", "attention call", "close", "build", "loading"])
def test_no_stall(what):
    course = Course()
    course.at(*4 * [(1, 0, "compute")])
    course.run(1)
    course.health.sent(plan(1))
    if what == "close":
        course.health.sent(Close())
    elif what == "build":
        course.health.sent(Build(settings_json=""))
    elif what == "loading":
        course.states[3] = (1, 0, "loading")
    for turn in range(10):
        if what == "result":  # results come, though no rank's heartbeat tells of it
            course.health.sent(plan(2 + turn))
            course.health.landed()
        elif what == "attention call":
            course.states[2] = (1, turn, "compute")
        assert course.run(5) is None


def test_copies_alone_are_no_step_in_flight():
    course = Course()
    course.run(1)
    course.health.sent(plan(1))
    course.health.landed()
    course.health.sent(StepPlan(step=2, loads=[(1, 2)]))
    assert course.run(20) is None
    course.health.sent(plan(3))
    course.health.sent(StepPlan(step=4, stores=[(1, 2)]))
    assert "no progress" in course.run(20)[0]


def test_results_that_come_after_a_close_do_not_hide_a_later_stall():
    course = Course()
    course.at(*4 * [(1, 0, "compute")])
    course.health.sent(plan(1))
    course.health.sent(Close())
    course.health.landed()
    course.health.sent(plan(1))
    assert "no progress" in course.run(20)[0]


def test_a_starved_thread_does_not_find_others_silent(monkeypatch):
    real = iter([0.0, 1.0, 101.0, 101.5])
    monkeypatch.setattr("time.monotonic", lambda: next(real))
    clock = WakingClock(longest_s=2.0)
    assert [clock.now() for _ in range(3)] == [1.0, 3.0, 3.5]


def test_heartbeats_are_many_within_a_timeout():
    assert beat_interval(6.0) == 1.0
    assert beat_interval(1.0) == 0.25


class DistError(RuntimeError):
    """As torch.distributed's, which cannot be had here."""


class DistBackendError(DistError):
    pass


@pytest.mark.parametrize(
    ("error", "reason", "communication"),
    [
        (ValueError("x"), "ValueError: x", False),
        (MemoryError(), "MemoryError", False),
        (DistBackendError("x"), "DistBackendError: x", True),
        (RuntimeError("[pair.cc:534] Connection closed by peer"), None, True),
        (RuntimeError("NCCL error in: x.cpp\nException raised from f at g.cpp:1\nframe #0"), "", True),
        (ConnectionResetError(104, "x"), "ConnectionResetError: [Errno 104] x", True),
        (RuntimeError("no model in /models/gloomy"), None, False),
    ],
)
def test_what_an_error_says(error, reason, communication):
    failure = describe(3, error)
    assert (failure.rank, failure.communication) == (3, communication)
    assert "frame #0" not in failure.reason
    if reason:
        assert failure.reason == reason
