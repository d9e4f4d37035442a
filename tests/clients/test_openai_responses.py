"""OpenAI's client against /v1/responses."""

import openai
import pytest
from asked import ANSWER, ITALY, KEY, City

ASK = {"model": "demo", "input": "What is the capital of Italy?", "temperature": 0, "max_output_tokens": 24}


@pytest.fixture(scope="module")
def client(base_url):
    with openai.OpenAI(base_url=base_url, api_key=KEY, timeout=60, max_retries=0) as client:
        yield client


def test_an_answer_and_its_stream_are_one(client):
    answer = client.responses.create(**ASK)
    assert ANSWER in answer.output_text and answer.status == "completed"
    assert client.responses.create(**ASK | {"input": ITALY}).output_text == answer.output_text
    with client.responses.stream(**ASK) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == answer.output_text


def test_parsed_answers(client):
    answer = client.responses.parse(**ASK | {"max_output_tokens": 60}, text_format=City)
    assert isinstance(answer.output_parsed, City)


def test_refusals(client):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(**ASK, previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="max_output_tokens"):
        client.responses.create(**ASK | {"max_output_tokens": -1})
