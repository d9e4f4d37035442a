"""What comes from servers that refuse, fail or break off, as sentences; and answers that call tools."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ds_serve.chat import talk
from ds_serve.chat.client import Server
from ds_serve.chat.context import Contexts

ASKED = {"role": "user", "content": "Hello"}


class Stub(ThreadingHTTPServer):
    """Answers each POST with the next of replies: (status, headers, body); seen are the bodies that came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen = [], []
        self.client = Server(f"http://127.0.0.1:{self.server_port}/v1", "key", "model")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, headers, body = self.server.replies.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refusal(status, message, code=None, **headers):
    body = {"error": {"message": message, "type": "x", "param": None, "code": code}}
    return status, {"Content-Type": "application/json"} | headers, json.dumps(body)


def stream(*deltas, finish="stop", done=True):
    """A reply of these deltas, one chunk each."""
    chunks = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    if finish:
        chunks.append({"index": 0, "delta": {}, "finish_reason": finish})
    same = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "model"}
    lines = [json.dumps(same | {"choices": [chunk]}) for chunk in chunks] + (["[DONE]"] if done else [])
    return 200, {"Content-Type": "text/event-stream"}, "".join(f"data: {line}\n\n" for line in lines)


def call(name, arguments):
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": 0, "id": "call-1", "type": "function", "function": function}]}


def answered(client, fields=None):
    """The turns after ASKED's answer."""

    async def run():
        turns = [dict(ASKED)]
        async for _ in talk.answer(client, "", turns, fields or {}, asyncio.Event()):
            pass
        return turns

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (refusal(401, "no key"), "Set OPENAI_API_KEY"),
        (refusal(404, "no model"), "Choose another model"),
        (
            refusal(429, "full", **{"Retry-After": "7"}),
            "The server is busy. Press retry in 7 s. It said: full",
        ),
        (refusal(503, "loading"), "is not ready: it starts, or ends. Press retry in a moment"),
        (refusal(400, "too long", "context_length_exceeded"), "too long for the model. Start a new chat"),
        (refusal(400, "top_p: must be below 1"), "Change what it names, then press retry. It said: top_p"),
        (refusal(500, "broken"), "look at its log"),
        ((502, {}, "<html>"), "look at its log"),
    ],
)
def test_a_refusal_is_a_sentence_that_says_what_to_do(stub, reply, told):
    stub.replies = [reply]
    turn = answered(stub.client)[-1]
    assert told in turn["error"] and turn["content"] == ""


def test_a_stream_that_breaks_off_keeps_its_text(stub):
    stub.replies = [stream({"content": "Once "}, {"content": "upon"}, finish=None, done=False)]
    turn = answered(stub.client)[-1]
    assert turn["content"] == "Once upon" and "connection broke" in turn["error"]
    assert "2 tokens or more" in turn["stats"]


def test_an_error_amid_a_stream_keeps_its_text(stub):
    status, headers, body = stream({"content": "Once "}, finish=None, done=False)
    stub.replies = [(status, headers, body + 'data: {"error": {"message": "engine died"}}\n\n')]
    turn = answered(stub.client)[-1]
    assert turn["content"] == "Once " and "It said: engine died" in turn["error"]


def test_nobody_answers():
    turn = answered(Server("http://127.0.0.1:9/v1", None, "model"))[-1]
    assert turn["error"].startswith("No server answers at http://127.0.0.1:9/v1. Start it")


def test_a_call_is_carried_out_and_told(stub):
    whole = call("calculator", '{"a": 6, "operation": "*", "b": 7}')
    stub.replies = [stream(whole, finish="tool_calls"), stream({"content": "42"})]
    turns = answered(stub.client, {"tool_choice": "required"})
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[2] == {"role": "tool", "tool_call_id": "call-1", "content": "42"}
    assert turns[3]["content"] == "42"
    first, second = stub.seen
    assert first["tool_choice"] == "required" and second["tool_choice"] == "none"
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert not any("stats" in message for message in second["messages"])


def test_a_call_that_was_cut_off_is_not_carried_out(stub):
    stub.replies = [stream(call("calculator", '{"a": 6, "op'), finish="length")]
    turns = answered(stub.client)
    assert len(turns) == 2 and "max_tokens" in turns[1]["error"]


def test_a_model_that_only_calls_is_stopped(stub):
    stub.replies = [stream(call("clock", "{}"), finish="tool_calls")] * 4
    assert "without an answer" in answered(stub.client)[-1]["error"]
    assert stub.replies == []


def test_a_server_without_handles_computes_the_context_all_the_same(stub):
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "model", "choices": [choice]}
    done = (200, {"Content-Type": "application/json"}, json.dumps(reply | {"usage": usage}))
    stub.replies = [refusal(400, "prompt_cache_ttl: unknown"), done]
    contexts = Contexts(stub.client)
    assert "20 tokens, ready in" in asyncio.run(contexts.keep("session", "text", None))
    assert "prompt_cache_key" in stub.seen[0] and "prompt_cache_key" not in stub.seen[1]
    assert contexts.fields("text") == {}
