"""langchain-openai's chat model: answers, streams, tools and structured output."""

import asyncio

import openai
import pytest
from asked import ANSWER, ITALY, KEY, City, Weather
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

QUESTION = ITALY[0]["content"]


@pytest.fixture
def chat(base_url):
    """Makes a ChatOpenAI with other arguments than usual."""

    def make(**arguments):
        usual = {"model": "demo", "api_key": KEY, "temperature": 0, "max_tokens": 60, "max_retries": 0}
        return ChatOpenAI(base_url=base_url, timeout=60, **usual | arguments)

    return make


def test_answers_streams_and_batches(chat):
    answer = chat().invoke(QUESTION)
    assert ANSWER in answer.content and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat().stream(QUESTION)) == answer.content
    assert asyncio.run(chat().ainvoke(QUESTION)).content == answer.content
    assert [each.content for each in chat().batch([QUESTION] * 2)] == [answer.content] * 2
    assert ANSWER in chat(use_responses_api=True).invoke(QUESTION).text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    assert isinstance(chat().with_structured_output(City, method=method).invoke(QUESTION), City)


def test_a_tool_is_called_and_its_result_answered(chat):
    bound = chat().bind_tools([Weather], tool_choice="required", parallel_tool_calls=False)
    asked = bound.invoke(QUESTION)
    [call] = asked.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    streamed = None
    for chunk in bound.stream(QUESTION):
        streamed = chunk if streamed is None else streamed + chunk
    assert [each["args"] for each in streamed.tool_calls] == [call["args"]]
    result = ToolMessage("blue sky", tool_call_id=call["id"])
    answer = chat(max_tokens=8).invoke([HumanMessage(QUESTION), asked, result])
    assert isinstance(answer, AIMessage) and answer.content


def test_errors(chat):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(temperature=-1).invoke(QUESTION)
    with pytest.raises(openai.AuthenticationError):
        chat(api_key="sk-wrong").invoke(QUESTION)
