"""The control plane with real processes and sockets: rank 0 is here, the others run control_ranks.py."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import control_ranks
import msgspec
import pytest
import zmq
from control_ranks import FileStore

from ds_serve.messages import Row, StepPlan, StepResult
from ds_serve.parallel import control
from ds_serve.parallel.control import Controller, Progress, RankFailure
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import KEY, Address, Build, Close, Gone, Leave, decode_down, encode

SOON_S = 20  # where something must happen; only a failing test waits so long


class Ranks:
    """Other ranks as processes, and the controller that leads them."""

    def __init__(self, folder: Path, tp: int, pp: int, timeout_s: float) -> None:
        self.folder, self._shape, self._timeout_s = folder, (tp, pp), timeout_s
        self.store = FileStore(folder)
        self.processes: dict[int, subprocess.Popen] = {}
        self.controller: Controller | None = None

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            command = [
                sys.executable,
                control_ranks.__file__,
                self.folder,
                rank,
                *self._shape,
                self._timeout_s,
            ]
            self.processes[rank] = subprocess.Popen(
                [str(each) for each in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

    def lead(self) -> Controller:
        self.controller = Controller(Place(0, *self._shape), self.store, self._timeout_s)
        return self.controller

    @property
    def address(self) -> Address:
        return msgspec.json.decode(self.store.get(KEY), type=Address)

    def build(self, **orders: list) -> None:
        self.controller.send(Build(settings_json=json.dumps({key[4:]: each for key, each in orders.items()})))
        self.controller.progress.phase = "idle"

    def step(self, *steps: int) -> None:
        for step in steps:
            self.controller.send(StepPlan(step=step))

    def failure(self) -> str:
        """Results may come first; then the one failure, which check() has too."""
        while not isinstance(found := self.controller.results.get(timeout=SOON_S), RankFailure):
            pass
        with pytest.raises(RankFailure) as raised:
            self.controller.check()
        assert raised.value is found
        return str(found)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def journal(self, rank: int) -> list[str]:
        return (self.folder / f"journal{rank}").read_text().split()

    def exit_codes(self, *ranks: int) -> list[int]:
        return [self.processes[rank].wait(SOON_S) for rank in ranks]

    def stderr(self, rank: int) -> str:
        return self.processes[rank].stderr.read()


@contextmanager
def ranks_in(folder: Path, tp: int = 2, pp: int = 2, timeout_s: float = 6.0):
    ranks = Ranks(folder, tp, pp, timeout_s)
    try:
        yield ranks
    finally:
        if ranks.controller is not None:
            ranks.controller.close()
        for process in ranks.processes.values():
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdout, process.stderr)):
                pipe.close()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(**shape): ranks that have joined, all on this machine."""
    monkeypatch.setenv("PYTHONPATH", str(Path(control.__file__).parents[2]))
    open_ranks = []

    def start(tp: int = 2, pp: int = 2, timeout_s: float = 6.0, local_size: int | None = None) -> Ranks:
        monkeypatch.setenv("LOCAL_SIZE", str(local_size or tp * pp))
        manager = ranks_in(tmp_path, tp, pp, timeout_s)
        ranks = manager.__enter__()
        open_ranks.append(manager)
        ranks.start(*range(1, tp * pp))
        ranks.lead().join(SOON_S)
        return ranks

    yield start
    for manager in open_ranks:
        manager.__exit__(None, None, None)


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
    monkeypatch.setenv("PYTHONPATH", str(Path(control.__file__).parents[2]))
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
    monkeypatch.setenv("PYTHONPATH", str(Path(control.__file__).parents[2]))
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("CONTROL_RANKS_LINGER", "1")
    with ranks_in(tmp_path, tp=2, pp=1, timeout_s=60) as ranks:
        ranks.start(0, 1)
        assert ranks.processes[0].stdout.readline() == "joined\n"
        ranks.kill(0, signal.SIGINT)
        assert ranks.exit_codes(0, 1) == [0, 0]
        assert ranks.stderr(1) == ""


def test_followers_end_when_rank_0_is_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(control.__file__).parents[2]))
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=2, pp=1, timeout_s=1) as ranks:
        ranks.start(0, 1)
        assert ranks.processes[0].stdout.readline() == "joined\n"
        ranks.kill(0, signal.SIGSTOP)
        assert ranks.exit_codes(1) == [1]
        assert "rank 0 gave no sign for 2 s" in ranks.stderr(1)


def test_a_follower_ends_when_its_launcher_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(control.__file__).parents[2]))
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=2, pp=1, timeout_s=6) as ranks:
        command = [sys.executable, control_ranks.__file__, str(tmp_path), "1", "2", "1", "6"]
        launcher = f"import subprocess; subprocess.run({command})"
        ranks.processes[1] = subprocess.Popen([sys.executable, "-c", launcher])
        ranks.lead().join(SOON_S)
        ranks.kill(1)
        assert ranks.failure() == "rank 1 (stage 0, tensor 1): the process died"


# -- joining -----------------------------------------------------------------------------------------


def test_who_does_not_join_is_named_and_the_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(control.__file__).parents[2]))
    monkeypatch.setenv("LOCAL_SIZE", "3")
    with ranks_in(tmp_path, tp=1, pp=3) as ranks:
        ranks.lead().close()
        assert not Path(ranks.address.folder).exists()
        controller = ranks.lead()
        folder = Path(ranks.address.folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {each.name for each in folder.iterdir()} == {"plans", "words"}
        with pytest.raises(TimeoutError, match=r"rank 1 \(stage 1.* and rank 2 \(stage 2.* within 0.1 s"):
            controller.join(0.1)
        ranks.start(1)
        said = "rank 1"
        while "rank 1" in said:
            with pytest.raises(TimeoutError) as raised:
                controller.join(0.1)
            said = str(raised.value)
        assert said == "rank 2 (stage 2, tensor 0) did not connect to rank 0 within 0.1 s"


def test_a_rank_that_speaks_and_does_not_hear_has_not_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=2, pp=1) as ranks:
        controller = ranks.lead()
        with zmq.Context() as context, context.socket(zmq.PUSH) as words:
            words.connect(ranks.address.words)
            words.send(encode(Progress().beat(1, os.getpid(), "elsewhere")))
            words.send(encode(StepResult(step=1)))
            assert controller.results.get(timeout=SOON_S).step == 1
            with pytest.raises(TimeoutError, match=r"^rank 1 \(stage 0, tensor 1\) did not connect"):
                controller.join(0.3)


def test_the_folder_is_gone_once_all_are_there(start):
    assert not Path(start(tp=2, pp=1).address.folder).exists()


# -- several machines --------------------------------------------------------------------------------


def test_over_tcp_with_keys(start, monkeypatch):
    monkeypatch.setenv("DS_SERVE_FORCE_TCP", "1")
    ranks = start(tp=1, pp=3)
    assert ranks.address.plans.startswith("tcp://127.0.0.1:")
    ranks.build()
    ranks.step(1, 2)
    assert [ranks.controller.results.get(timeout=SOON_S).step for _ in range(2)] == [1, 2]
    ranks.kill(1)
    assert ranks.failure() == "rank 1 (stage 1, tensor 0): the process died"


def knock(address: Address, **keys: bytes) -> tuple[zmq.Context, zmq.Socket, zmq.Socket]:
    context = zmq.Context()
    words, plans = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    for each, endpoint in ((words, address.words), (plans, address.plans)):
        each.linger = 0
        for name, value in keys.items():
            setattr(each, f"curve_{name}", value)
        if each is plans:
            each.subscribe(b"")
        each.connect(endpoint)
    words.send(encode(StepResult(step=666)))
    return context, words, plans


def test_strangers_neither_hear_nor_are_heard(start):
    ranks = start(tp=1, pp=2, local_size=1)  # so it is several machines
    address = ranks.address
    assert address.server_key
    public, secret = zmq.curve_keypair()
    server = address.server_key.encode()
    strangers = [
        knock(address),
        knock(address, serverkey=server, publickey=public, secretkey=secret),
        knock(address, serverkey=public, publickey=public, secretkey=secret),
    ]
    own_public, own_secret = (key.encode() for key in address.client_keys)
    friend = knock(address, serverkey=server, publickey=own_public, secretkey=own_secret)
    assert friend[2].poll(SOON_S * 1000)  # a heartbeat: who may come in is in by now
    assert ranks.controller.results.get(timeout=SOON_S).step == 666
    ranks.build()
    ranks.step(1)
    assert ranks.controller.results.get(timeout=SOON_S).step == 1
    for _, _, plans in strangers:
        assert not plans.poll(100)
    assert ranks.controller.results.empty()
    for context, words, plans in [*strangers, friend]:
        words.close()
        plans.close()
        context.term()


@pytest.mark.parametrize("master", ["127.0.0.1", "localhost", "10.9.8.7", "node-1"])
def test_rank_0_is_found_where_the_launcher_said(tmp_path, monkeypatch, master):
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=4, pp=1) as ranks:
        ranks.lead()
        for endpoint in (ranks.address.plans, ranks.address.words):
            assert endpoint.startswith(f"tcp://{master}:")
            port = int(endpoint.rpartition(":")[2])
            assert _can_connect("127.0.0.1", port)
            assert _can_connect("127.0.0.2", port) == (master not in ("127.0.0.1", "localhost"))


def _can_connect(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


# -- messages ----------------------------------------------------------------------------------------


def test_what_is_no_message_is_a_failure_of_the_link(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with ranks_in(tmp_path, tp=2, pp=1) as ranks:
        ranks.lead()
        with zmq.Context() as context, context.socket(zmq.PUSH) as words:
            words.connect(ranks.address.words)
            words.send(b"\xc1")
            assert ranks.failure().startswith("rank 0 (stage 0, tensor 0): its control link failed: ")
            with pytest.raises(RankFailure):
                ranks.controller.join(SOON_S)
            ranks.controller.send(Close())  # nobody hears it, and nothing breaks
            ranks.controller.report(ValueError())


def test_a_plan_of_64_rows_comes_back_as_it_was():
    rows = [
        Row(slot=i, start=1000 + i, count=1, new_block_ids=[i], sample=True, token_ids=[7 * i])
        for i in range(64)
    ]
    for message in (
        StepPlan(step=3, rows=rows),
        Build(settings_json="{}"),
        Close(),
        Leave(),
        Gone(reason="x"),
    ):
        assert decode_down(encode(message)) == message
