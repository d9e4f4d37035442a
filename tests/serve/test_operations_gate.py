"""The gate: keys, sizes, times, room; names, the access log, CORS. A real uvicorn over a fake engine."""

import contextlib
import json
import logging
import socket
import threading

import openai
import pytest
from fake_server import HELLO, error_of, until
from gated_server import gated, line_of, logged

from ds_serve.config import Settings
from ds_serve.server.accesslog import prompt_log

LIMIT = 3000
CHAT = {"model": "fake", "messages": HELLO}
KEY = {"Authorization": "Bearer key-one"}


@pytest.fixture(scope="module")
def locked(codec, tmp_path_factory):
    """Two keys, a page's origin."""
    folder = tmp_path_factory.mktemp("ipc")
    keys = folder / "keys"
    keys.write_text("# ours\nkey-one\n\n  key-two  \n")
    with gated(codec, folder, api_key_file=str(keys), cors_origins=["https://chat.example"]) as server:
        yield server


@pytest.fixture(scope="module")
def limited(codec, tmp_path_factory):
    """No keys; small bodies, at most two requests at a time, an answer in 5 s."""
    folder = tmp_path_factory.mktemp("ipc")
    with gated(codec, folder, max_request_bytes=LIMIT, max_open_requests=2, request_timeout=5) as server:
        yield server


@pytest.fixture
def server(limited):
    limited.reset()
    return limited


@pytest.fixture
def lines():
    with logged() as kept:
        yield kept


# -- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer key-three"},
        {"Authorization": "Bearer key-on"},
        {"Authorization": "Basic key-one"},
        {"Authorization": "key-one"},
        {"api-key": "key-one"},
    ],
)
def test_without_a_key_nothing_but_health_is_served(locked, headers):
    for method, path in [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/health/"),
        ("GET", "/nowhere"),
    ]:
        response = locked.http.request(method, path, headers=headers)
        status, error = error_of(response)
        assert (status, error.code, error.type) == (401, "invalid_api_key", "invalid_request_error")
        assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]
        assert "key-" not in response.text
    for path in ("/health", "/ready", "/version"):
        assert locked.http.get(path, headers=headers).status_code == 200
    assert not [request for request in locked.engine.requests if not request.id.startswith("ready-")]


def test_each_key_opens(locked):
    for key in ("key-one", "key-two"):
        client = openai.OpenAI(base_url=locked.url + "/v1", api_key=key, max_retries=0)
        assert [model.id for model in client.models.list()] == ["fake"]
    assert locked.http.get("/metrics", headers={"Authorization": "bearer key-two"}).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="Authorization"):
        locked.openai.models.list()


def test_metrics_may_be_open_beside_keys(codec, tmp_path):
    with gated(codec, tmp_path, api_keys=["k"], open_metrics=True) as server:
        assert [server.http.get(path).status_code for path in ("/metrics", "/v1/models")] == [200, 401]


# -- size, time, room --------------------------------------------------------------------------


def body_of(size):
    start = b'{"model": "fake", "prompt": "hi", "max_tokens": 1'
    return start + b" " * (size - len(start) - 1) + b"}"


def in_parts(body):
    return (body[at : at + 500] for at in range(0, len(body), 500))


@pytest.mark.parametrize("parts", [False, True])
def test_a_body_may_be_so_large_and_no_larger(server, parts):
    for size, wanted in ((LIMIT, 200), (LIMIT + 1, 413)):
        content = in_parts(body_of(size)) if parts else body_of(size)
        headers = {"Content-Type": "application/json"}
        response = server.http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == wanted, response.text
    assert error_of(response)[1].code == "request_too_large" and "3000" in response.text
    assert len(server.engine.requests) == 1


def test_an_upload_far_too_large_still_reads_its_answer(server):
    for content in (b"x" * 5_000_000, (b"x" * 100_000 for _ in range(50))):
        assert server.http.post("/v1/completions", content=content).status_code == 413
    assert server.http.get("/version").status_code == 200


def talk(server, *pieces):
    """A connection that has sent these bytes."""
    connection = socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10)
    for piece in pieces:
        connection.sendall(piece)
    return connection


def read_all(connection):
    """What comes until the server closes."""
    data = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def test_slow_arrivals_are_given_up(codec, tmp_path):
    with gated(codec, tmp_path, body_timeout=0.2) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n"
        answer = read_all(talk(server, head + b"\r\n", b"{"))
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"timeout"' in answer
        assert read_all(talk(server, head)) == b"" == read_all(talk(server))
        # Idle between requests is another matter.
        with talk(server) as connection:
            for _ in range(2):
                connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
                data = b""
                while not data.endswith(b"}"):
                    data += connection.recv(65536)
                assert data.startswith(b"HTTP/1.1 200")
                threading.Event().wait(0.3)
        assert server.engine.requests == []


def test_a_client_that_leaves_while_it_sends_is_no_error(server, lines):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\nContent-Length: 90\r\n\r\n{"
    with talk(server, head):
        until(lambda: server.front.door.num_open)
    line = line_of(lines, "gone")
    assert (line["end"], line["status"], server.front.door.num_open) == ("client_gone", 0, 0)


def test_a_head_without_end_is_refused(server):
    answer = read_all(talk(server, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000))
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e999"])
def test_a_time_that_is_none_is_refused(server, value):
    response = server.http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Timeout": value})
    status, error = error_of(response)
    assert (status, error.param) == (400, "X-Request-Timeout") and repr(value) in error.message


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models?limit=3", "limit"),
        ("/v1/cache/key?cache_salt=a&salt=b", "salt"),
        ("/v1/cache/key?cache_salt=a&cache_salt=b", "cache_salt"),
        ("/version?x", "x"),
    ],
)
def test_a_query_that_nobody_reads_is_refused(server, path, name):
    status, error = error_of(server.http.request("DELETE" if "cache" in path else "GET", path))
    assert (status, error.param, error.code) == (400, name, "unsupported_parameter")


def test_a_query_that_is_read_comes_through(server):
    assert server.http.delete("/v1/cache/key?cache_salt=%C3%9F").status_code == 204


def test_a_key_in_the_path_may_hold_anything(server):
    assert server.http.delete("/v1/cache/a%0Ab%2Fc%3F").status_code == 204


def test_the_clients_time_ends_a_request(server):
    server.engine.hold.set()
    headers = {"X-Request-Timeout": "0.05"}
    response = server.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    status, error = error_of(response)
    assert (status, error.code, error.type) == (504, "timeout", "server_error")
    until(lambda: server.engine.aborted == [server.engine.requests[0].id])


@pytest.mark.parametrize(
    ("asked", "limit", "wanted"), [(b"3", 5, 3), (b"9", 5, 5), (b"9", None, 9), (None, 5, 5)]
)
def test_the_shorter_time_counts(asked, limit, wanted):
    from ds_serve.server.gate import _timeout_s

    assert _timeout_s(asked, limit) == wanted


def test_a_full_server_says_when_to_come_again(server):
    server.engine.hold.set()
    threads = [
        threading.Thread(target=server.post, args=("completions",), kwargs={"prompt": "x"}) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(server.engine.requests) == 2)
    response = server.post("completions", prompt="x")
    assert error_of(response)[1].code == "too_many_requests"
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert server.http.get("/version").status_code == 200
    server.engine.hold.clear()
    for thread in threads:
        thread.join(10)
    assert server.post("completions", prompt="x").status_code == 200


def test_open_requests_are_bounded_by_what_the_engine_takes():
    assert Settings(model="m", max_num_seqs=8, max_queue=100).open_requests_limit == 108


# -- methods and sockets -----------------------------------------------------------------------


def test_head_is_get_without_its_body(server):
    response = server.http.head("/version")
    assert (response.status_code, response.content, "server" in response.headers) == (200, b"", False)
    assert response.headers["content-length"] == server.http.get("/version").headers["content-length"]


def test_a_wrong_method_is_told_the_right_one(server):
    for method in ("GET", "OPTIONS", "PUT"):
        response = server.http.request(method, "/v1/chat/completions")
        assert (error_of(response)[0], response.headers["allow"]) == (405, "POST")


def test_a_websocket_is_an_ordinary_request(server):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers = upgrade | {"Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw=="}
    assert server.http.get("/nowhere", headers=headers).status_code == 404


# -- names and the log -------------------------------------------------------------------------


def test_a_request_keeps_its_name(server):
    def name_of(sent):
        return server.http.get("/nowhere", headers={"X-Request-Id": sent}).headers["x-request-id"]

    assert name_of("trace-1/2:3") == "trace-1/2:3"
    assert name_of("x" * 128) == "x" * 128
    for bad in ("x" * 129, "a b", "a\tb", ""):
        made = name_of(bad)
        assert made != bad and len(made) == 32
    first, second = (server.http.get("/version").headers["x-request-id"] for _ in "ab")
    assert first != second
    assert server.post("completions", prompt="x", n=0).headers["x-request-id"]


def test_a_line_for_each_request(locked, lines):
    secret = {"model": "fake", "prompt": "hello secret", "max_tokens": 3, "n": 2}

    def ask(name, method, path, **options):
        return locked.http.request(method, path, headers=KEY | {"X-Request-Id": name}, **options)

    answer = ask("one", "POST", "/v1/completions", json=secret)
    ask("two", "POST", "/v1/completions", json=secret | {"stream": True}).read()
    ask("three", "GET", "/v1/models/a%0Ab")
    locked.http.get("/v1/models?q=secret", headers={"X-Request-Id": "four"})
    one, stream, missing, stranger = (line_of(lines, name) for name in ("one", "two", "three", "four"))
    assert one.pop("time").endswith("+00:00") and one.pop("duration_ms") > 0
    usage = answer.json()["usage"]
    assert one == {
        "request_id": "one", "client": "127.0.0.1", "method": "POST", "path": "/v1/completions",
        "status": 200, "bytes": len(answer.content), "end": "complete", "key": 1,
        "prompt_tokens": usage["prompt_tokens"], "cached_tokens": 2, "completion_tokens": 6,
        "finish": ["length"],
    }  # fmt: skip
    assert (stream["status"], stream["end"]) == (200, "complete") and stream["bytes"] > 100
    assert (missing["path"], missing["status"]) == ("/v1/models/a\nb", 404) and "finish" not in missing
    assert (stranger["status"], stranger["key"]) == (401, 0)
    assert "secret" not in str(lines) and "key-" not in str(lines) and "hello" not in str(lines)


def test_a_failure_of_ours_has_a_name_and_a_line(server, lines, monkeypatch, caplog):
    monkeypatch.setattr(server.front, "adapter_of", lambda name: 1 / 0)
    response = server.http.get("/v1/models/x", headers={"X-Request-Id": "broken"})
    status, error = error_of(response)
    assert (status, error.type, response.headers["x-request-id"]) == (500, "server_error", "broken")
    assert response.headers.get("connection") != "close" and server.http.get("/version").status_code == 200
    line = line_of(lines, "broken")
    assert (line["status"], line["end"]) == (500, "failed")
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "broken" in record.getMessage() and record.exc_info[0] is ZeroDivisionError


def test_refusals_at_the_gate_are_counted(server):
    def refused():
        for line in server.http.get("/metrics").text.splitlines():
            if line.startswith("ds_serve_http_requests_total") and 'status="413"' in line:
                return float(line.split()[-1])
        return 0.0

    before = refused()
    server.http.post("/v1/completions", content=b"x" * (LIMIT + 1))
    until(lambda: refused() == before + 1)


def test_the_line_of_a_client_that_left(server, lines):
    server.engine.step_s = 0.02
    server.reply = lambda request: [30] * 50
    body = {"model": "fake", "prompt": "x", "stream": True, "max_tokens": 50}
    headers = {"X-Request-Id": "left"}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        next(response.iter_lines())
    line = line_of(lines, "left")
    assert (line["end"], line["status"], line["finish"]) == ("client_gone", 200, ["abort"])
    until(lambda: server.engine.aborted)


def test_prompts_are_logged_only_where_asked(server, lines):
    def ask(name):
        body = {"model": "fake", "prompt": "hello prompt"}
        server.http.post("/v1/completions", json=body, headers={"X-Request-Id": name})
        return line_of(lines, name)

    assert "body" not in ask("quiet")
    prompt_log.setLevel(logging.INFO)
    assert json.loads(ask("loud")["body"])["prompt"] == "hello prompt"


# -- CORS --------------------------------------------------------------------------------------


def test_pages_of_other_origins_are_let_in_only_where_named(locked, server):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours, other = {"Origin": "https://chat.example"}, {"Origin": "https://evil.example"}
    answer = locked.http.options("/v1/chat/completions", headers=ours | preflight)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ours["Origin"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for headers in (ours, ours | KEY):  # a page reads the refusal too
        answer = locked.http.get("/v1/models", headers=headers)
        assert answer.headers["access-control-allow-origin"] == ours["Origin"]
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert locked.http.options("/v1/models", headers=other | preflight).status_code == 400
    assert "access-control-allow-origin" not in locked.http.get("/v1/models", headers=other | KEY).headers
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=ours).headers
