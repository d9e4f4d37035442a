"""The load test's reading of streams and replies, and the bodies it sends."""

import msgspec
import pytest

from ds_serve.bench.endpoints import Piece, Usage, endpoint
from ds_serve.bench.options import Options
from ds_serve.bench.prompts import Prompt
from ds_serve.bench.sse import EventReader

STREAM = (
    "\ufeffdata: first\n\n: a comment\n\nevent: named\r\ndata: 🙂 é\r\n\r\ndata:no space\rdata:  two\r\r"
    "id: 7\n\n\n\ndata: [DONE]\n\ndata: unfinished"
).encode()
EVENTS = [b"first", "🙂 é".encode(), b"no space\n two", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_are_whole_wherever_the_stream_is_cut(size):
    reader = EventReader()
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in reader.feed(piece)] == EVENTS


def test_every_single_cut_gives_the_same_events():
    for cut in range(len(STREAM)):
        reader = EventReader()
        assert reader.feed(STREAM[:cut]) + reader.feed(STREAM[cut:]) == EVENTS, cut


def body(prompt, **options):
    made = endpoint(Options(**options), "m").body([prompt] if isinstance(prompt, Prompt) else prompt)
    return msgspec.json.decode(made)


def test_bodies_say_what_was_asked_for():
    ids = Prompt([3, 4], 8)
    assert body(ids) == {
        "model": "m",
        "prompt": [3, 4],
        "max_tokens": 8,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert body(ids, stream=False, ignore_eos=False) == {"model": "m", "prompt": [3, 4], "max_tokens": 8}
    assert body([ids, Prompt([5], 9)], endpoint="batch", batch_size=2, ignore_eos=False) == {
        "model": "m",
        "prompt": [[3, 4], [5]],
        "max_tokens": 9,
    }
    chat = body(Prompt("hi", 8), endpoint="chat", usage=False)
    assert chat["messages"] == [{"role": "user", "content": "hi"}] and "stream_options" not in chat
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert body(Prompt(turns, 8), endpoint="chat")["messages"] == turns
    assert body(Prompt("hi", 8), endpoint="responses")["input"] == "hi"


def test_extra_fields_are_added_and_null_takes_one_out():
    fields = body(Prompt("hi", 8), extra={"temperature": 0, "max_tokens": None, "ignore_eos": None})
    assert fields["temperature"] == 0 and fields.keys().isdisjoint({"max_tokens", "ignore_eos"})


def test_openais_events_are_read():
    chat = endpoint(Options(endpoint="chat"), "m")
    opening = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
    assert chat.event(opening) == Piece()
    assert chat.event(b'{"choices":[{"delta":{"content":"a"}}],"usage":null}') == Piece(generated=True)
    call = b'{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}}]}'
    assert chat.event(call) == Piece(generated=True)
    assert chat.event(b'{"choices":[{"delta":{},"finish_reason":"stop"}]}') == Piece(finished=True)
    counts = b'"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":8}}'
    assert chat.event(b'{"choices":[],%b}' % counts).usage == Usage(9, 2, 8, 0)
    assert chat.event(b'{"error":{"message":"no engine","code":1}}').error == "no engine"
    assert chat.event(b'{"error":"plain"}').error == "plain"
    with pytest.raises(msgspec.DecodeError):
        chat.event(b"not json")


def test_responses_events_are_read():
    route = endpoint(Options(endpoint="responses"), "m")
    assert (
        route.event(b'{"type":"response.created","response":{"status":"in_progress","usage":null}}')
        == Piece()
    )
    assert route.event(b'{"type":"response.output_text.delta","delta":"a"}') == Piece(generated=True)
    usage = b'{"input_tokens":9,"output_tokens":2,"input_tokens_details":{"cached_tokens":4}}'
    done = route.event(b'{"type":"response.completed","response":{"status":"completed","usage":%b}}' % usage)
    assert done == Piece(finished=True, usage=Usage(9, 2, 4, 0))
    failed = b'{"type":"response.failed","response":{"status":"failed","error":{"message":"gone"}}}'
    assert route.event(failed).error == "gone"
    assert route.event(b'{"type":"error","message":"bad"}').error == "bad"
    assert route.reply(b'{"status":"completed","usage":%b}' % usage).usage == Usage(9, 2, 4, 0)
