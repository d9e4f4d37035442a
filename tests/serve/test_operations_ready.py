"""/ready tells an engine that works from one that only seems to; a client that reads nothing is cut off."""

import json
import socket
import threading

import httpx
import msgspec
import pytest
from fake_engine import INFO
from fake_server import error_of, until
from gated_server import GatedServer, gated, line_of, logged


@pytest.fixture(scope="module")
def probed(codec, tmp_path_factory):
    with gated(codec, tmp_path_factory.mktemp("ipc")) as server:
        yield server


@pytest.fixture
def server(probed):
    """Nothing is fresh, and a probe has little time."""
    probed.reset()
    readiness = probed.app.state.readiness
    readiness.fresh_s, readiness.probe_timeout_s, readiness.failed_s = 0.0, 0.1, 0.0
    return probed


@pytest.fixture
def lines():
    with logged() as kept:
        yield kept


def ready(server):
    return server.http.get("/ready")


def probes(server):
    return [request for request in server.engine.requests if request.id.startswith("ready-")]


def test_a_probe_is_one_token_before_all_others_in_a_cache_of_its_own(server):
    answer = ready(server)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    [probe] = server.engine.requests
    assert (probe.params.max_tokens, len(probe.prompt_token_ids)) == (1, 1)
    assert probe.priority < -(2**31) and probe.salt and not probe.cache_key


def test_a_token_of_anybody_is_proof_enough(server):
    server.app.state.readiness.fresh_s = 600.0
    server.post("completions", prompt="x")
    assert ready(server).status_code == 200
    assert probes(server) == []


def test_a_hung_engine_is_not_ready_and_alive(server):
    server.engine.hold.set()
    status, error = error_of(ready(server))
    assert (status, error.code) == (503, "not_ready") and "no token" in error.message
    assert server.http.get("/health").status_code == 200
    until(lambda: server.engine.aborted == [probes(server)[0].id])
    server.engine.hold.clear()
    assert ready(server).status_code == 200


def test_many_askers_share_a_probe_and_its_failure(server):
    server.app.state.readiness.failed_s = 600.0
    server.engine.hold.set()
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.get(f"{server.url}/ready"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [503] * 8
    assert len(probes(server)) == 1
    server.engine.hold.clear()
    server.app.state.readiness._failed_until = 0.0
    assert ready(server).status_code == 200


def test_a_client_that_stops_waiting_leaves_the_probe_to_the_next(server):
    server.app.state.readiness.probe_timeout_s = 20.0
    server.engine.hold.set()
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{server.url}/ready", timeout=0.05)
    server.engine.hold.clear()
    assert ready(server).status_code == 200
    assert len(probes(server)) <= 2 and server.engine.aborted == []


def test_an_engine_that_refuses_is_not_ready(server):
    server.refusal = lambda request: "the queue is full: 7 requests wait"
    status, error = error_of(ready(server))
    assert status == 503 and "queue is full" in error.message


def test_a_dead_engine_is_not_ready_however_fresh(codec, tmp_path):
    with gated(codec, tmp_path) as server:
        server.post("completions", prompt="x")
        assert ready(server).status_code == 200
        server.engine.leave("lost its device")
        until(lambda: ready(server).status_code == 503)
        assert "lost its device" in ready(server).text


def test_a_draining_server_is_not_ready_and_takes_no_more(server):
    try:
        with httpx.Client(base_url=server.url) as client:  # one connection, which stays open
            assert client.get("/ready").status_code == 200
            server.front.door.close()
            for method, path in (("GET", "/ready"), ("POST", "/v1/completions"), ("GET", "/v1/models")):
                response = client.request(method, path)
                assert error_of(response)[1].code == "draining"
                assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            assert client.get("/health").status_code == client.get("/version").status_code == 200
    finally:
        server.front.door.is_closing = False


# -- slow readers ------------------------------------------------------------------------------


TOKENS = 5000


class LongServer(GatedServer):
    """Answers of many tokens, over connections whose sockets hold little."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.engine.info = msgspec.structs.replace(INFO, max_model_len=2 * TOKENS)
        self.reply = lambda request: [30] * TOKENS


BODY = {"model": "fake", "prompt": "x", "stream": True, "max_tokens": TOKENS, "logprobs": 1}


def ask_and_read_nothing(server):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    data = json.dumps(BODY).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: slow\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_a_client_that_reads_nothing_is_dropped_and_holds_up_nobody(codec, tmp_path, monkeypatch, lines):
    create_server = socket.create_server

    def with_little(*args, **options):
        listener = create_server(*args, **options)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return listener

    monkeypatch.setattr(socket, "create_server", with_little)
    server = LongServer(codec, tmp_path, stream_stall_timeout=0.5)
    server.start()
    try:
        with ask_and_read_nothing(server):
            until(lambda: server.engine.requests)
            headers = {"X-Request-Id": "quick"}
            quick = server.http.post("/v1/completions", json=BODY, headers=headers)
            assert quick.text.endswith("data: [DONE]\n\n")
            slow, quick = line_of(lines, "slow"), line_of(lines, "quick")
    finally:
        server.stop()
    assert (slow["end"], quick["end"]) == ("stalled", "complete")
    assert slow["bytes"] < quick["bytes"] / 2
