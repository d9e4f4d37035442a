"""The control plane with real processes and sockets: rank 0 is here, the others run control_ranks.py."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import control_ranks
import pytest
from control_harness import HOUSE, SOON_S, Ranks, ranks_in

from ds_serve.messages import StepResult
from ds_serve.parallel.wire import Close, Leave


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(**shape): ranks that have joined, all on this machine."""
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    with ExitStack() as stack:

        def start(tp: int = 2, pp: int = 2, timeout_s: float = 6.0) -> Ranks:
            monkeypatch.setenv("LOCAL_SIZE", str(tp * pp))
            ranks = stack.enter_context(ranks_in(tmp_path, tp, pp, timeout_s))
            ranks.start(*range(1, tp * pp))
            ranks.lead().join(SOON_S)
            return ranks

        yield start


# -- plans, results, the end -------------------------------------------------------------------------


def test_every_rank_follows_in_order_and_ends_with_code_0(start):
    ranks = start()
    steps = list(range(1, 201))
    for _ in range(2):  # one engine after another
        ranks.build()
        ranks.step(*steps)
        results = [ranks.controller.results.get(timeout=SOON_S) for _ in steps]
        assert [result.step for result in results] == steps
        ranks.controller.send(Close())
    assert results[-1] == StepResult(step=200, token_ids=steps + steps)
    ranks.controller.check()
    ranks.controller.send(Leave())
    ranks.controller.close()
    assert ranks.exit_codes(1, 2, 3) == [0, 0, 0]
    for rank in (1, 2, 3):
        assert ranks.journal(rank) == 2 * ["Build", *map(str, steps), "Close"]
    with pytest.raises(queue.Empty):  # that they ended is no failure
        ranks.controller.results.get_nowait()


def test_busy_seconds_of_each_stage_come_with_heartbeats(start):
    ranks = start(tp=1, pp=2, timeout_s=1)
    ranks.controller.progress.busy_s = 7.0
    ranks.build()
    ranks.step(1, 2)
    for _ in range(SOON_S * 20):
        if ranks.controller.stage_busy_s() == [7.0, 0.5]:
            break
        ranks.controller.check(wait_s=0.05)
    assert ranks.controller.stage_busy_s() == [7.0, 0.5]
    ranks.controller.check(wait_s=2)  # the results that came in were counted: this is no stall


def test_the_folder_is_gone_once_all_are_there(start):
    assert not Path(start(tp=2, pp=1).address.folder).exists()


# -- failures ----------------------------------------------------------------------------------------


def test_a_rank_killed_while_idle_is_named(start):
    ranks = start()
    ranks.kill(2)
    assert ranks.failure() == "rank 2 (stage 1, tensor 0): the process died"
    ranks.controller.close()
    assert ranks.exit_codes(1, 3) == [1, 1]
    assert "rank 3 (stage 1, tensor 1): rank 0 gave up: rank 2 (stage 1, tensor 0)" in ranks.stderr(3)


def test_the_dead_rank_is_blamed_and_not_those_that_lost_it(start):
    ranks = start()
    victim = ranks.processes[3].pid
    ranks.build(rank3=[3, "hang compute 2"], rank1=[3, f"lose {victim}"], rank2=[3, f"lose {victim}"])
    ranks.step(1, 2, 3)
    while ranks.controller.results.get(timeout=SOON_S).step < 2:
        pass
    ranks.kill(3)
    ranks.controller.report(RuntimeError(control_ranks.GLOO))
    assert ranks.failure() == "rank 3 (stage 1, tensor 1): the process died"
    with pytest.raises(queue.Empty):
        ranks.controller.results.get_nowait()


def test_a_death_without_pidfds_is_a_lost_connection(start, monkeypatch):
    def refuse(pid):
        raise OSError("not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    ranks = start(tp=2, pp=1, timeout_s=30)
    ranks.kill(1)
    assert ranks.failure() == "rank 1 (stage 0, tensor 1): the connection to it was lost"


def test_what_a_rank_raised_is_told(start):
    ranks = start()
    ranks.build(rank1=[2, "raise"])
    ranks.step(1, 2)
    assert ranks.failure() == "rank 1 (stage 0, tensor 1): ValueError: no such expert"


def test_what_rank_0_raised_is_told(start):
    ranks = start(tp=2, pp=1)
    ranks.controller.report(MemoryError())
    assert ranks.failure() == "rank 0 (stage 0, tensor 0): MemoryError"
    ranks.controller.kill()
    assert ranks.exit_codes(1) == [-signal.SIGKILL]


def test_a_stopped_rank_is_named_after_the_timeout(start):
    ranks = start(timeout_s=1)
    ranks.kill(2, signal.SIGSTOP)
    assert ranks.failure() == "rank 2 (stage 1, tensor 0): no heartbeat for 1 s"


def test_a_stall_with_live_heartbeats_names_the_rank_that_is_behind(start):
    ranks = start(timeout_s=1)
    ranks.build(rank1=[5, "hang compute 3"], rank2=[5, "hang receive 0"], rank3=[5, "hang receive 0"])
    progress = ranks.controller.progress  # rank 0 waits for rank 1 in the all-reduce behind attention call 4
    progress.step, progress.phase, progress.batch = 5, "compute", type("Batch", (), {"num_calls": 4})
    ranks.step(1, 2, 3, 4, 5)
    expected = "rank 1 (stage 0, tensor 1): no progress for 1 s, computing step 5 (attention call 3)"
    assert ranks.failure() == expected


def test_followers_end_when_rank_0_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    monkeypatch.setenv("LOCAL_SIZE", "3")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with ranks_in(tmp_path, tp=3, pp=1, timeout_s=60) as ranks:
        ranks.start(0, 1, 2)
        assert ranks.processes[0].stdout.readline() == "joined\n"
        ranks.processes[2].stderr.close()  # as when its reader was killed too
        ranks.kill(0)
        assert ranks.exit_codes(1, 2) == [1, 1]
        assert "rank 1 (stage 0, tensor 1): rank 0's process died" in ranks.stderr(1)
        assert list(tmp_path.glob("ds-serve-*")) == []


def test_a_follower_that_may_leave_outlives_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("CONTROL_RANKS_LINGER", "1")
    with ranks_in(tmp_path, tp=2, pp=1, timeout_s=60) as ranks:
        ranks.start(0, 1)
        assert ranks.processes[0].stdout.readline() == "joined\n"
        ranks.kill(0, signal.SIGINT)
        assert ranks.exit_codes(0, 1) == [0, 0]
        assert ranks.stderr(1) == ""


def test_followers_end_themselves_and_a_silent_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=2, pp=1, timeout_s=1) as ranks:
        ranks.start(0, 1)
        assert ranks.processes[0].stdout.readline() == "joined\n"
        ranks.kill(0, signal.SIGSTOP)
        assert ranks.exit_codes(1, 0) == [1, -signal.SIGKILL]
        assert "rank 0 gave no sign for 2 s" in ranks.stderr(1)


def test_a_follower_ends_when_its_launcher_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=2, pp=1, timeout_s=6) as ranks:
        command = [sys.executable, control_ranks.__file__, str(tmp_path), "1", "2", "1", "6"]
        launcher = f"import subprocess; subprocess.run({command})"
        ranks.processes[1] = subprocess.Popen([sys.executable, "-c", launcher])
        ranks.lead().join(SOON_S)
        ranks.kill(1)
        assert ranks.failure() == "rank 1 (stage 0, tensor 1): the process died"
