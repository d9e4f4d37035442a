"""How ranks meet: who has joined, private folders, keys over tcp, and what a message is."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
import zmq
from control_harness import HOUSE, SOON_S, ranks_in

from ds_serve.messages import Row, StepPlan, StepResult
from ds_serve.parallel.control import Progress, RankFailure
from ds_serve.parallel.wire import Address, Build, Close, Gone, Leave, decode_down, encode

# -- joining -----------------------------------------------------------------------------------------


def test_who_does_not_join_is_named_and_the_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
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


# -- several machines --------------------------------------------------------------------------------


def test_over_tcp_with_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    monkeypatch.setenv("LOCAL_SIZE", "3")
    monkeypatch.setenv("DS_SERVE_FORCE_TCP", "1")
    with ranks_in(tmp_path, tp=1, pp=3) as ranks:
        ranks.start(1, 2)
        ranks.lead().join(SOON_S)
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


def test_strangers_neither_hear_nor_are_heard(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HOUSE)
    monkeypatch.setenv("LOCAL_SIZE", "1")  # of two ranks: so there are several machines
    with ranks_in(tmp_path, tp=1, pp=2) as ranks:
        ranks.start(1)
        ranks.lead().join(SOON_S)
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
    rows = [Row(slot=i, start=1000 + i, count=1, new_block_ids=[i], sample=True) for i in range(64)]
    for message in (
        StepPlan(step=3, rows=rows),
        StepPlan(step=4, loads=[(70_000, 3), (1, 2)], stores=[(5, 0)]),
        Build(settings_json="{}"),
        Close(),
        Leave(),
        Gone(reason="x"),
    ):
        assert decode_down(encode(message)) == message
