"""LiteLLM, as a library, with the server as an OpenAI-compatible provider."""

import asyncio

import litellm
import pytest
from asked import ANSWER, GREEDY, ITALY, KEY, LONG, City, Weather, schema, tool


@pytest.fixture
def ask(base_url):
    """litellm.completion with the question, or what is given in its place."""

    def ask(call=litellm.completion, **body):
        usual = {"model": "openai/demo", **GREEDY, "api_base": base_url, "api_key": KEY, "max_retries": 0}
        question = {} if "prompt" in body else {"messages": ITALY}
        return call(**question | usual | {"timeout": 60} | body)

    return ask


def test_answers_and_streams(ask):
    text = ask().choices[0].message.content
    assert ANSWER in text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == text
    assert asyncio.run(ask(litellm.acompletion)).choices[0].message.content == text


def test_schemas_and_tools(ask):
    City.model_validate_json(ask(max_tokens=60, response_format=schema(City)).choices[0].message.content)
    City.model_validate_json(ask(max_tokens=60, response_format=City).choices[0].message.content)
    answer = ask(tools=[tool(Weather)], tool_choice="required", parallel_tool_calls=False, max_tokens=80)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "Weather"
    Weather.model_validate_json(call.function.arguments)


def test_the_text_endpoint(ask):
    answer = ask(litellm.text_completion, prompt="Once upon")
    assert answer.choices[0].text


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (litellm.BadRequestError, {"temperature": -1}),
        (litellm.AuthenticationError, {"api_key": "sk-wrong"}),
        (litellm.NotFoundError, {"model": "openai/other"}),
        (litellm.Timeout, {"timeout": 0.3, **LONG}),
    ],
)
def test_errors_have_their_class(ask, kind, change):
    with pytest.raises(kind):
        ask(**change)
