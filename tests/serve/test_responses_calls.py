"""Functions in /v1/responses over a fake engine whose tokenizer's template knows tools."""

import json

import msgspec
import pytest
from fake_engine import INFO
from fake_server import Server, error_of, make_codec
from openai import pydantic_function_tool
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from ds_serve.server.responses_reply import ResponseReply

EVENT = TypeAdapter(ResponseStreamEvent)
TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }};{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{% if m.name %}({{ m.name }}){% endif %};{% endfor %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
ONE = CALL % "Rome"
TWO = f"Let me see.\n{ONE}\n{CALL % 'Oslo'}"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    codec = make_codec(tmp_path_factory.mktemp("model"))
    codec.tokenizer.chat_template = TEMPLATE
    server = Server(codec, tmp_path_factory.mktemp("ipc"))
    server.engine.info = msgspec.structs.replace(INFO, max_model_len=1024, vocab_size=300)
    server.start()
    yield server
    server.stop()


def create(server, **body):
    body = {"model": "fake", "input": "hello", "tools": [TOOL]} | body
    return server.openai.responses.create(**body)


def prompt(server):
    return server.codec.decode(server.engine.requests[-1].prompt_token_ids, False)


def test_text_and_calls_are_items_of_their_own(server):
    server.reply = lambda request: server.codec.encode(TWO)
    answer = create(server)
    Response.model_validate(answer.to_dict())
    ResponseReply.model_validate(answer.to_dict())
    text, rome, oslo = answer.output
    assert text.type == "message" and answer.output_text == "Let me see."
    assert (rome.type, rome.name, json.loads(rome.arguments)) == (
        "function_call",
        "weather",
        {"city": "Rome"},
    )
    assert json.loads(oslo.arguments) == {"city": "Oslo"} and len({rome.call_id, oslo.call_id, rome.id}) == 3
    assert {item.status for item in answer.output} == {answer.status} == {"completed"}
    assert (answer.tools[0].name, answer.tool_choice, answer.parallel_tool_calls) == ("weather", "auto", True)
    assert server.engine.requests[0].params.grammar and '"weather"' in prompt(server)


def test_calls_are_streamed(server):
    server.reply = lambda request: server.codec.encode(TWO)
    events = list(create(server, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for before, kind in zip(["", *kinds], kinds, strict=False) if kind != before]
    call = ("added", "call_arguments.delta", "call_arguments.done", "done")
    call = [f"{'function_' if 'call' in part else 'output_item.'}{part}" for part in call]
    assert once == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", *call, *call, "completed"),
    ]
    for index, city in ((1, "Rome"), (2, "Oslo")):
        told = [e for e in events if getattr(e, "output_index", None) == index]
        arguments = "".join(e.delta for e in told if e.type.endswith("arguments.delta"))
        assert arguments == told[-2].arguments == told[-1].item.arguments == f'{{"city": "{city}"}}'
        assert {e.item_id for e in told[1:-1]} == {told[0].item.id} == {told[-1].item.id}
    assert [e.item for e in events if e.type.endswith("item.done")] == events[-1].response.output


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_short_is_incomplete(server, stream):
    server.reply = lambda request: server.codec.encode(ONE)
    answer = create(server, max_output_tokens=len(server.codec.encode(ONE)) - 20, stream=stream)
    answer = list(answer)[-1].response if stream else answer
    [call] = answer.output
    assert answer.status == call.status == "incomplete"
    assert '{"city": "Rome"}'.startswith(call.arguments)


def test_a_conversation_with_calls(server):
    server.reply = lambda request: server.codec.encode(TWO)
    answer = create(server)
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": city}
        for call, city in zip(
            answer.output[1:], ("sun", [{"type": "input_text", "text": "rain"}]), strict=True
        )
    ]
    create(server, input=[{"role": "user", "content": "hello"}, *answer.output, *results])
    assert prompt(server).partition("];")[2] == (
        'user:hello;assistant:Let me see.[weather {"city": "Rome"}][weather {"city": "Oslo"}];'
        "tool:sun(weather);tool:rain(weather);"
    )


def test_the_client_parses_arguments(server):
    class Weather(BaseModel):
        city: str

    tool = pydantic_function_tool(Weather, name="weather")
    server.reply = lambda request: server.codec.encode(ONE)
    answer = server.openai.responses.parse(model="fake", input="hello", tools=[tool])
    [call] = answer.output
    assert call.parsed_arguments == Weather(city="Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    create(server, input=[call, result])
    with server.openai.responses.stream(model="fake", input="hello", tools=[tool]) as stream:
        assert [e.snapshot for e in stream if e.type.endswith("arguments.delta")][-1] == '{"city": "Rome"}'
        assert stream.get_final_response().output[0].name == "weather"


def test_choices(server):
    server.reply = lambda request: server.codec.encode("hello")
    free = create(server, tool_choice="none")
    assert free.tool_choice == "none" and server.engine.requests[-1].params.grammar == ""
    server.reply = lambda request: server.codec.encode(ONE)
    for choice in ("required", {"type": "function", "name": "weather"}):
        answer = create(server, tool_choice=choice, parallel_tool_calls=False)
        assert answer.output[0].name == "weather" and answer.parallel_tool_calls is False
        assert server.engine.requests[-1].params.grammar != ""
    assert answer.tool_choice.name == "weather"


def test_no_tools_are_none(server):
    answer = create(server, tools=[], tool_choice="auto", parallel_tool_calls=True)
    assert answer.tools == [] and server.engine.requests[0].params.grammar == ""


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"tools": [TOOL, TOOL]}, "tools", "two functions"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools", "name"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools", "tools[0].parameters: must be"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tools are given"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "none of tools"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'function'"),
        ({"text": {"format": {"type": "json_object"}}}, "text", "not beside tools"),
        ({"include": ["message.output_text.logprobs"]}, "include", "beside tools"),
        ({"max_tool_calls": 1}, "max_tool_calls", "not supported"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input", "'x'"),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "y", "arguments": "z"}]},
            "input",
            "JSON",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_names_the_field(server, body, param, words):
    status, error = error_of(server.post("responses", **({"input": "hello", "tools": [TOOL]} | body)))
    assert status == 400 and error.param.split(".")[0] == param and words in error.message
    assert param in error.message and server.engine.requests == []


def test_tokenize_counts_tools(server):
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    body = {"messages": [{"role": "user", "content": "hello"}], "tools": [tool]}
    told = server.http.post("/tokenize", json=body).json()
    server.reply = lambda request: server.codec.encode("hello")
    server.chat(**body)
    assert told["tokens"] == server.engine.requests[0].prompt_token_ids and '"weather"' in prompt(server)
