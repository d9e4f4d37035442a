"""Tool calls in chat completions, as clients see them: the HTTP front over a fake engine that answers so."""

import json

import msgspec
import openai
import pytest
from fake_engine import INFO
from fake_server import HELLO, Server, error_of, make_codec
from pydantic import BaseModel

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}{% for m in messages %}"
    "{{ m.role }}{% if m.name %}/{{ m.name }}{% endif %}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}({{ c.function.arguments.city }})"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


class Now(BaseModel):
    pass


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Now)]
NAMED = {"type": "function", "function": {"name": "Weather"}}
ARGUMENTS = '{"city": "Röm 🙂", "days": 2}'
ONE = f'<tool_call>\n{{"name": "Weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "Now", "arguments": {}}\n</tool_call>'
BOTH = [("Weather", ARGUMENTS), ("Now", "{}")]


@pytest.fixture(scope="module", params=["text", "special"])
def running(request, tmp_path_factory):
    """In one tokenizer the marks are text, in the other special tokens, which decoding usually leaves out."""
    codec = make_codec(tmp_path_factory.mktemp("model"))
    codec.tokenizer.chat_template = TEMPLATE
    if request.param == "special":
        codec.tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    server = Server(codec, tmp_path_factory.mktemp("ipc"))
    server.engine.info = msgspec.structs.replace(INFO, max_model_len=2048)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def ask(running):
    """ask(answer, **body): what the client is told of an engine that answers so."""
    running.reset()

    def ask(answer, **body):
        running.reply = lambda request: running.codec.encode(answer)
        return running.chat(**{"tools": TOOLS, **body})

    return ask


def calls_of(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def streamed(chunks, index=0):
    """Content, calls and finish_reason of a choice's chunks, each piece in the shape that OpenAI gives it."""
    chunks = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
    assert chunks[0].delta.role == "assistant" and chunks[0].delta.content is None
    content, calls, ids = None, [], set()
    for chunk in chunks:
        assert (chunk.finish_reason is not None) == (chunk is chunks[-1])
        content = content if chunk.delta.content is None else (content or "") + chunk.delta.content
        for piece in chunk.delta.tool_calls or []:
            if piece.index == len(calls):
                assert piece.id.startswith("call_") and piece.type == "function"
                ids.add(piece.id)
                calls.append((piece.function.name, ""))
            else:
                assert (piece.id, piece.type, piece.function.name) == (None, None, None)
                assert piece.index == len(calls) - 1 and piece.function.arguments
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.function.arguments)
    assert len(ids) == len(calls) and not chunks[-1].delta.tool_calls
    return content, calls, chunks[-1].finish_reason


@pytest.mark.parametrize(
    "answer, body, told",
    [
        (ONE, {}, (None, BOTH[:1], "tool_calls")),
        (TWO, {"tool_choice": "required"}, (None, BOTH, "tool_calls")),
        (f"Let me see.\n\n{TWO}", {"tool_choice": "auto"}, ("Let me see.", BOTH, "tool_calls")),
        (ONE, {"tool_choice": NAMED}, (None, BOTH[:1], "stop")),
        (ONE, {"parallel_tool_calls": False}, (None, BOTH[:1], "tool_calls")),
        ("No.\n", {}, ("No.\n", [], "stop")),
        ("", {}, (None, [], "stop")),
        (ONE, {"stop": ["Röm"]}, (None, [("Weather", '{"city": "')], "stop")),
    ],
)
def test_calls_are_told_whole_and_streamed(running, ask, answer, body, told):
    choice = ask(answer, **body).choices[0]
    assert (choice.message.content, calls_of(choice.message), choice.finish_reason) == told
    assert (choice.message.tool_calls is None) == (not told[1])
    assert streamed(ask(answer, stream=True, **body)) == told
    for request in running.engine.requests:
        assert '"Weather' in request.params.grammar.replace("\\", "")


def test_tool_choice_none_leaves_text_alone(running, ask):
    text = "Say <tool_call>." if "<tool_call>" not in running.codec.vocab else "Say {."
    for body in ({"tool_choice": "none"}, {"tool_choice": "none", "response_format": {"type": "text"}}):
        choice = ask(text, **body).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == (text, None)
    request = running.engine.requests[0]
    assert request.params.grammar == ""
    assert running.codec.decode(request.prompt_token_ids).startswith("[Weather Now ]user:hello;")


def test_the_grammar_is_of_what_may_be_called(running, ask):
    ask(ONE, tool_choice=NAMED)
    ask(ONE, parallel_tool_calls=False)
    ask(ONE)
    named, single, auto = (request.params.grammar for request in running.engine.requests)
    assert "Weather" in named and "Now" not in named and "TEXT" not in named
    assert "Now" in single and "TEXT" in single
    assert len(auto) > len(single), "another call may follow"


@pytest.mark.parametrize("max_tokens", [20, 60])
def test_a_call_that_was_cut_off_is_told_as_far_as_it_came(running, ask, max_tokens):
    choice = ask(ONE, max_tokens=max_tokens).choices[0]
    partial = running.codec.decode(running.codec.encode(ONE)[:max_tokens], skip_special_tokens=False)
    told = [("Weather", partial[partial.index('{"city') :].rstrip("\ufffd"))] if max_tokens == 60 else []
    assert choice.finish_reason == "length" and choice.message.content is None
    assert [(name, arguments.rstrip("\ufffd")) for name, arguments in calls_of(choice.message)] == told


def test_each_choice_has_calls_of_its_own(running, ask):
    answers = {5: ONE, 6: "No.", 7: TWO}
    running.reply = lambda request: running.codec.encode(answers[request.params.seed])
    body = {"tools": TOOLS, "n": 3, "seed": 5}
    told = [(None, BOTH[:1]), ("No.", []), (None, BOTH)]
    choices = running.chat(**body).choices
    assert [(choice.message.content, calls_of(choice.message)) for choice in choices] == told
    chunks = list(running.chat(stream=True, **body))
    assert [streamed(chunks, index)[:2] for index in range(3)] == told


def test_logprobs_of_calls_are_those_of_all_tokens(running, ask):
    tokens = len(running.codec.encode(ONE))
    assert len(ask(ONE, logprobs=True).choices[0].logprobs.content) == tokens
    entries = [chunk.choices[0].logprobs for chunk in ask(ONE, logprobs=True, stream=True)]
    assert sum(len(entry.content) for entry in entries if entry is not None) == tokens


# -- OpenAI's own helpers ----------------------------------------------------------------------


def test_parsed_calls_go_back_with_their_results(running, ask):
    running.reply = lambda request: running.codec.encode(f"Well. {TWO}")
    messages = [{"role": "user", "content": "Rome?"}]
    asked = {"model": "fake", "tools": TOOLS}
    message = running.openai.chat.completions.parse(messages=messages, **asked).choices[0].message
    weather, now = message.tool_calls
    assert weather.function.parsed_arguments == Weather(city="Röm 🙂", days=2)
    assert now.function.parsed_arguments == Now()
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22"} for call in message.tool_calls]
    by_litellm = message.model_dump() | {"provider_specific_fields": {"refusal": None}}
    for echoed in (message, message.model_dump(), message.model_dump(exclude_none=True), by_litellm):
        running.engine.requests.clear()
        running.chat(messages=[*messages, echoed, *results], tools=TOOLS)
        prompt = running.codec.decode(running.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
        assert prompt == (
            "[Weather Now ]user:Rome?;assistant:Well.<tool_call>Weather(Röm 🙂)<tool_call>Now();"
            "tool/Weather:22;tool/Now:22;assistant:"
        )


def test_the_stream_helper_reads_every_call(running, ask):
    running.reply = lambda request: running.codec.encode(f"Well. {TWO}")
    asked = {"model": "fake", "tools": TOOLS, "messages": HELLO}
    with running.openai.chat.completions.stream(**asked) as stream:
        events = list(stream)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name, event.arguments) for event in done] == [
        (i, *call) for i, call in enumerate(BOTH)
    ]
    assert [event.content for event in events if event.type == "content.done"] == ["Well."]
    message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Röm 🙂", days=2)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22"} for call in message.tool_calls]
    assert running.chat(messages=[*HELLO, message, *results], tools=TOOLS).choices


# -- refusals ----------------------------------------------------------------------------------


def tool(**function):
    return {"type": "function", "function": {"name": "f"} | function}


def call(arguments="{}", **function):
    function = {"name": "f", "arguments": arguments} | function
    return {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


TOOL = {"tools": [tool()]}
REFUSED = [
    ({"tools": [tool(name="no blanks")]}, "tools", "pattern"),
    ({"tools": [tool(name="x" * 65)]}, "tools", "pattern"),
    ({"tools": [tool(colour=1)]}, "tools", "colour"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "'function'"),
    ({"tools": [tool(), tool()]}, "tools", "two functions have the name 'f'"),
    ({"tools": [tool(name=f"f{i}") for i in range(129)]}, "tools", "at most 128"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools", "schema of an object"),
    ({"tools": [tool(parameters={"properties": {"a": {"type": "text"}}})]}, "tools", "text"),
    ({"tools": [tool(), tool(name="g", parameters={"if": {}})]}, "tools", "tools[1].function.parameters"),
    ({"tools": [tool(parameters=nested(60))]}, "tools", "deeper than 100"),
    ({"chat_template_kwargs": {"x": nested(60)}}, "chat_template_kwargs", "deeper than 100"),
    ({"tool_choice": "auto"}, "tool_choice", "only where tools"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "only where tools"),
    (TOOL | {"tool_choice": "any"}, "tool_choice", "'required'"),
    (TOOL | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g' is none"),
    (TOOL | {"tool_choice": {"type": "function"}}, "tool_choice", "required"),
    (TOOL | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice", "allowed_tools"),
    (TOOL | {"guided_regex": "a"}, "guided_regex", "not beside tools"),
    (TOOL | {"response_format": {"type": "json_object"}}, "response_format", "not beside tools"),
    (TOOL | {"ignore_eos": True}, "ignore_eos", "grammar"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ({"function_call": "auto"}, "function_call", "not supported"),
    ({"messages": [call("{")]}, "messages", "must be JSON"),
    ({"messages": [call("[]")]}, "messages", "must be a JSON object, got list"),
    ({"messages": [call('{"a": NaN}')]}, "messages", "must be JSON"),
    ({"messages": [call("[" * 100_000)]}, "messages", "must be JSON"),
    ({"messages": [call(json.dumps(nested(60)))]}, "messages", "deeper than 100"),
    ({"messages": [call(name="")]}, "messages", "pattern"),
    ({"messages": [HELLO[0] | {"tool_calls": call()["tool_calls"]}]}, "messages", "role is 'assistant'"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages", "at least 1"),
    (
        {"messages": [{"role": "assistant", "content": None, "refusal": None}]},
        "messages",
        "content: required",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages", "refusal"),
    ({"messages": [call() | {"provider_specific_fields": {"a": 1}}]}, "messages", "provider_specific_fields"),
    ({"messages": [call(), {"role": "tool", "content": "1"}]}, "messages", "tool_call_id: required"),
    ({"messages": [HELLO[0] | {"tool_call_id": "a"}]}, "messages", "only there"),
    ({"messages": [call(), {"role": "tool", "content": "1", "tool_call_id": "b"}]}, "messages", "the id 'b'"),
    ({"messages": [call(), {"role": "tool", "tool_call_id": "a"}]}, "messages", "content: required"),
]


@pytest.mark.parametrize("running", ["text"], indirect=True)
@pytest.mark.parametrize("body, param, words", REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_a_400_that_names_the_field(running, ask, body, param, words):
    status, error = error_of(running.post("chat/completions", **({"messages": HELLO} | body)))
    assert status == 400 and error.type == "invalid_request_error"
    assert error.param.split(".")[0] == param and param in error.message and words in error.message
    assert running.engine.requests == []


def test_a_model_that_knows_no_tools_says_so(codec, tmp_path):
    server = Server(codec, tmp_path)
    server.start()
    try:
        history = {"messages": [*HELLO, call(), {"role": "tool", "content": "1", "tool_call_id": "a"}]}
        for body in (TOOL, TOOL | {"tool_choice": "none"}, history):
            status, error = error_of(server.post("chat/completions", **({"messages": HELLO} | body)))
            assert (status, error.param) == (400, "tools") and "no place for tools" in error.message
    finally:
        server.stop()
