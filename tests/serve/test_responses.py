"""/v1/responses over a fake engine, judged by the OpenAI client and its types."""

import asyncio
import functools

import openai
import pytest
from fake_server import ANSWER, Server, error_of, until
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ds_serve.server.responses_reply import ResponseReply

EVENT = TypeAdapter(ResponseStreamEvent)


SCHEMA = {
    "text": {
        "format": {
            "type": "json_schema",
            "name": "answer",
            "strict": True,
            "schema": {"type": "object", "properties": {"n": {"type": "integer"}}},
        }
    }
}
DEEP = functools.reduce(lambda inner, _: {"a": inner}, range(200), {})


def create(server, **body):
    return server.openai.responses.create(**({"model": "fake", "input": "hello"} | body))


def check(answer):
    """It is what OpenAI's types say, and what our document says."""
    Response.model_validate(answer.to_dict())
    ResponseReply.model_validate(answer.to_dict())


def prompts(server):
    return [server.codec.decode(request.prompt_token_ids, False) for request in server.engine.requests]


def test_answer(server):
    answer = create(server, temperature=0.5, metadata={"a": "b"}, user="u")
    check(answer)
    assert answer.output_text == ANSWER and answer.status == "completed" and answer.id.startswith("resp_")
    assert (answer.model, answer.temperature, answer.metadata, answer.store) == (
        "fake",
        0.5,
        {"a": "b"},
        False,
    )
    assert prompts(server) == ["<s>user:hello</s>assistant:"]
    tokens = len(server.codec.encode(ANSWER)) + 1
    sent = len(server.engine.requests[0].prompt_token_ids)
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (sent, tokens, sent + tokens)
    details = usage.input_tokens_details
    assert (details.cached_tokens, details.host_cached_tokens) == (2, 1)
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_stream(server):
    events = list(create(server, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
        if event.type in ("response.created", "response.in_progress", "response.completed"):
            check(event.response)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-4].text == ANSWER and deltas >= 1
    last = events[-1].response
    assert last.output_text == ANSWER and last.usage.output_tokens > 5 and last.output[0] == events[-2].item
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}


def test_events_have_names_and_no_end_mark(server):
    text = server.post("responses", input="hello", stream=True).text
    events = [event.split("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    assert events[0][0] == "event: response.created" and events[-1][0] == "event: response.completed"
    assert all(len(event) == 2 and event[1].startswith('data: {"type":') for event in events)


def test_the_openapi_document_has_the_reply(server):
    route = server.http.get("/openapi.json").json()["paths"]["/v1/responses"]["post"]
    content = route["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/ResponseReply")
    assert "text/event-stream" in content and "stored" in route["description"]


# -- what is asked -----------------------------------------------------------------------------


def test_a_conversation_of_every_form(server):
    answer = create(server, instructions="be brief")
    create(server, instructions="be brief", input=[*answer.output, {"role": "user", "content": "more"}])
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    create(server, input=[{"type": "message", "role": "developer", "content": parts}])
    assert prompts(server) == [
        "<s>system:be brief</s>user:hello</s>assistant:",
        f"<s>system:be brief</s>assistant:{ANSWER}</s>user:more</s>assistant:",
        "<s>developer:one\ntwo</s>assistant:",
    ]


def test_parameters_reach_the_engine(server):
    body = {"temperature": 0.25, "top_p": 0.5, "max_output_tokens": 3, "prompt_cache_key": "k"}
    ours = {
        "seed": 7,
        "top_k": 4,
        "priority": -1,
        "cache_salt": "s",
        "chat_template_kwargs": {"mood": "glad"},
    }
    answer = create(server, **body, extra_body=ours)
    [request] = server.engine.requests
    params = request.params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 3)
    assert (params.seed, params.top_k, params.logprobs) == (7, 4, None)
    assert (request.priority, request.salt, request.cache_key) == (-1, "s", "k")
    assert prompts(server) == ["<s>user:hello</s>gladassistant:"]
    assert (answer.top_p, answer.max_output_tokens, answer.prompt_cache_key) == (0.5, 3, "k")


def test_the_temperature_told_is_the_one_used(server):
    assert (create(server).temperature, create(server).top_p) == (0.7, 1.0)  # the model's, then OpenAI's


def test_what_clients_send_for_nothing_is_taken(server):
    body = {"store": False, "background": False, "truncation": "disabled", "service_tier": "auto"}
    answer = create(server, **body, safety_identifier="x", previous_response_id=None, reasoning=None)
    assert (answer.service_tier, answer.truncation, answer.safety_identifier) == ("default", "disabled", "x")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_cut_short_is_incomplete(server, stream):
    answer = create(server, max_output_tokens=2, stream=stream)
    if stream:
        *_, item, event = answer
        assert event.type == "response.incomplete" and item.item.status == "incomplete"
        answer = event.response
    check(answer)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output_text == server.codec.decode(server.codec.encode(ANSWER)[:2])
    assert answer.usage.output_tokens == 2 and answer.output[0].status == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_completes_the_answer(server, stream):
    server.engine.step_s = 0.01
    answer = create(server, stream=stream, extra_body={"stop": ["wor"]})
    answer = list(answer)[-1].response if stream else answer
    assert (answer.status, answer.output_text) == ("completed", ANSWER.removesuffix("world"))
    until(lambda: server.engine.aborted)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server, stream):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": stream}
    answer = create(server, **asked)
    if stream:
        events = list(answer)
        for event in events:
            EVENT.validate_python(event.to_dict())
        answer = events[-1].response
        told = [entry for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
        check(answer)
        assert [entry.token for entry in told] == [e.token for e in answer.output[0].content[0].logprobs]
    entries = answer.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == ANSWER
    assert entries[0].logprob == -0.5 and entries[0].top_logprobs[1].logprob == -9999.0
    assert answer.top_logprobs == 2


# -- the client's other ways -------------------------------------------------------------------


def test_the_clients_stream_helper(server):
    with server.openai.responses.stream(model="fake", input="hello") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == ANSWER


def test_the_async_client(server):
    async def talk():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            answer = await client.responses.create(model="fake", input="hello")
            stream = await client.responses.create(model="fake", input="hello", stream=True)
            return answer.output_text, [event async for event in stream][-1].response.output_text

    assert asyncio.run(talk()) == (ANSWER, ANSWER)


# -- refusals and failures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"input": None}, "input", "required"),
        ({"input": 5}, "input", "string"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input", "'system'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_image"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "'message'"),
        ({"input": ["x"]}, "input", "'message'"),
        ({"input": "x" * 100}, "input", "64"),
        ({"max_output_tokens": 60}, "max_output_tokens", "64"),
        ({"max_output_tokens": 0}, "max_output_tokens", "equal to 1"),
        ({"max_tokens": 5}, "max_tokens", "not supported"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"response_format": {"type": "text"}}, "response_format", "not supported"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "logprobs"),
        ({"store": True}, "store", "False"),
        ({"background": True}, "background", "False"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
        ({"text": {"verbosity": "low"}}, "text", "not supported"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "json_schema"),
        ({"chat_template_kwargs": DEEP}, "chat_template_kwargs", "nested"),
        ({"text": {"format": SCHEMA["text"]["format"] | {"schema": DEEP}}}, "text", "nested"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text", "only there"),
        (SCHEMA | {"guided_regex": "a"}, "guided_regex", "text.format"),
        ({"text": {"format": SCHEMA["text"]["format"] | {"schema": {"type": "no"}}}}, "text", "text.format"),
        ({"service_tier": "flex"}, "service_tier", "'default'"),
        ({"metadata": {"a": 1}}, "metadata", "string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream is true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "False"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_refusal_names_the_field(server, body, param, words):
    status, error = error_of(server.post("responses", **({"input": "hello"} | body)))
    assert status == 400 and error.param.split(".")[0] == param and words in error.message
    assert param in error.message and server.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_a_status(server, stream):
    server.refusal = lambda request: "the queue is full: x"
    assert error_of(server.post("responses", input="hello", stream=stream))[0] == 429
    assert error_of(server.post("responses", input="hello", model="other"))[0] == 404


def test_a_client_that_goes_away_aborts(server):
    server.engine.step_s = 0.05
    with create(server, stream=True) as stream:
        next(stream)
    until(lambda: server.engine.aborted == [server.engine.requests[0].id])


def test_engine_death_fails_the_response(codec, tmp_path):
    server = Server(codec, tmp_path)
    server.start()
    try:
        server.engine.step_s = 0.05
        stream = create(server, stream=True)
        next(stream)
        server.engine._leaving = "out of memory"
        last = list(stream)[-1]
        EVENT.validate_python(last.to_dict())
        check(last.response)
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error.code == "server_error" and "out of memory" in last.response.error.message
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            create(server)
    finally:
        server.stop()
