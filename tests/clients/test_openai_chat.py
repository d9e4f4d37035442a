"""OpenAI's own client: chats, streams, schemas and tools, synchronous and not."""

import asyncio
import json

import openai
import pytest
from asked import ANSWER, GREEDY, ITALY, KEY, City, Weather, schema, tool

ASK = {"model": "demo", "messages": ITALY, **GREEDY}
CALL = {"tools": [tool(Weather), tool(City)], "max_tokens": 80, "temperature": 0}


@pytest.fixture(scope="module")
def client(base_url):
    with openai.OpenAI(base_url=base_url, api_key=KEY, timeout=60, max_retries=0) as client:
        yield client


@pytest.fixture
def run_async(base_url):
    """Runs a coroutine function with an asynchronous client."""

    def run(work):
        async def main():
            async with openai.AsyncOpenAI(
                base_url=base_url, api_key=KEY, timeout=60, max_retries=0
            ) as client:
                return await work(client)

        return asyncio.run(main())

    return run


def test_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "ds_serve"


def test_an_answer_and_its_stream_are_one(client, run_async):
    answer = client.chat.completions.create(**ASK)
    text = answer.choices[0].message.content
    assert ANSWER in text and answer.choices[0].finish_reason == "stop"

    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)

    async def both(client):
        whole = await client.chat.completions.create(**ASK)
        stream = await client.chat.completions.create(**ASK, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(parts)

    assert run_async(both) == (text, text)


def test_raw_and_streamed_responses(client):
    raw = client.chat.completions.with_raw_response.create(
        **ASK, extra_headers={"X-Request-Id": "of-the-client"}
    )
    assert raw.status_code == 200 and raw.headers["x-request-id"] == "of-the-client"
    assert ANSWER in raw.parse().choices[0].message.content
    with client.chat.completions.with_streaming_response.create(**ASK) as response:
        assert ANSWER in json.loads(response.read())["choices"][0]["message"]["content"]


def test_choices_logprobs_and_seeds(client):
    body = {"model": "demo", "messages": ITALY, "max_tokens": 8, "temperature": 1.5, "n": 2, "seed": 7}
    first, second = (client.chat.completions.create(**body, logprobs=True, top_logprobs=2) for _ in "ab")
    assert [choice.message.content for choice in first.choices] == [
        choice.message.content for choice in second.choices
    ]
    assert [choice.index for choice in first.choices] == [0, 1]
    for entry in first.choices[0].logprobs.content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 2


def test_completions_of_several_prompts(client):
    texts = ["The capital of", "Once upon a time"]
    batch = client.completions.create(model="demo", prompt=texts, max_tokens=6, temperature=0)
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="demo", prompt=texts, max_tokens=6, temperature=0, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in batch.choices] == streamed
    echoed = client.completions.create(
        model="demo", prompt=texts[0], max_tokens=1, temperature=0, echo=True, logprobs=1
    ).choices[0]
    assert echoed.text.startswith(texts[0]) and echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == len(echoed.logprobs.token_logprobs)


def test_the_streams_helper(client, run_async):
    with client.chat.completions.stream(**ASK) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert ANSWER in final.choices[0].message.content
    assert events[-1] == "content.done" and set(events) == {"chunk", "content.delta", "content.done"}

    async def texts(client):
        async with client.chat.completions.stream(**ASK) as stream:
            return [event.delta async for event in stream if event.type == "content.delta"]

    assert "".join(run_async(texts)) == final.choices[0].message.content


# -- schemas ---------------------------------------------------------------------------------------


def test_json_schema(client):
    answer = client.chat.completions.create(**ASK | {"max_tokens": 60}, response_format=schema(City))
    City.model_validate_json(answer.choices[0].message.content)
    free = client.chat.completions.create(**ASK | {"max_tokens": 60}, response_format={"type": "text"})
    assert ANSWER in free.choices[0].message.content


def test_parsed_answers(client, run_async):
    body = ASK | {"max_tokens": 60, "response_format": City}
    parsed = client.chat.completions.parse(**body).choices[0].message.parsed
    assert isinstance(parsed, City)
    with client.chat.completions.stream(**body) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed

    async def parse(client):
        return (await client.chat.completions.parse(**body)).choices[0].message.parsed

    assert run_async(parse) == parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**body | {"max_tokens": 3})


# -- tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "City"}}])
def test_a_call_that_has_to_be(client, choice):
    body = {"model": "demo", "messages": ITALY, **CALL, "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**body).choices[0]
    [call] = answer.message.tool_calls
    models = {"Weather": Weather, "City": City}
    assert choice == "required" or call.function.name == "City"
    models[call.function.name].model_validate_json(call.function.arguments)

    name, arguments, reason = "", "", None
    for chunk in client.chat.completions.create(**body, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (name, arguments, reason) == (call.function.name, call.function.arguments, answer.finish_reason)


def test_tools_through_the_helpers(client):
    tools = [openai.pydantic_function_tool(Weather)]
    body = {"model": "demo", "messages": ITALY, **CALL, "tools": tools, "tool_choice": "required"}
    body["parallel_tool_calls"] = False
    [call] = client.chat.completions.parse(**body).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**body) as stream:
        types = {event.type for event in stream}
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in types
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


def test_a_tools_result_is_answered(client):
    body = {"model": "demo", **CALL, "tool_choice": "required"}
    asked = client.chat.completions.create(messages=ITALY, **body).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "blue"}'} for call in asked.tool_calls
    ]
    answer = client.chat.completions.create(
        model="demo",
        messages=[*ITALY, asked, *results],
        tools=CALL["tools"],
        tool_choice="none",
        max_tokens=8,
    )
    assert answer.choices[0].message.content is not None and not answer.choices[0].message.tool_calls
