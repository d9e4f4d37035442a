"""Each field that the OpenAI client can send: what is taken of it, and what is refused by its name.

The tables name all of the client's fields, so that a newer client's fields are noticed.
"""

import jsonschema
import pytest
from fake_server import HELLO, error_of
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}

# field: (values that are taken, values that are refused)
SAMPLING = {
    "frequency_penalty": ([1.5], [3]),
    "logit_bias": ([{"5": 1}, {}], [{"x": 1}]),
    "n": ([2], [0]),
    "presence_penalty": ([-1.5], [3]),
    "seed": ([3], ["x"]),
    "stop": (["x", ["x", "y"]], [""]),
}
SHARED = {
    "model": (["fake"], [5]),
    "temperature": ([0, 2], [-1]),
    "top_p": ([0.5], [0]),
    "user": (["me"], [5]),
}
ACCOUNT = {
    "prompt_cache_key": (["k"], [5]),
    "prompt_cache_options": ([], [{"mode": "implicit"}]),
    "prompt_cache_retention": ([], ["in_memory", "24h"]),
    "moderation": ([], [{"model": "m"}]),
    "safety_identifier": (["me"], ["x" * 129]),
    "service_tier": (["auto", "default"], ["flex", "priority"]),
    "store": ([False], [True]),
}
CHAT = (
    SAMPLING
    | SHARED
    | ACCOUNT
    | {
        "audio": ([], [{"voice": "x", "format": "wav"}]),
        "function_call": ([], ["auto"]),
        "functions": ([], [[FUNCTION]]),
        "logprobs": ([True, False], ["x"]),
        "max_completion_tokens": ([5], [0, 64]),
        "max_tokens": ([5], [0, 64]),
        "messages": ([HELLO], [[]]),
        "metadata": ([], [{"a": "b"}]),  # it goes with what is stored
        "modalities": ([["text"]], [["text", "audio"], ["audio"]]),
        "parallel_tool_calls": ([], [True]),  # beside tools only
        "prediction": ([], [{"type": "content", "content": "x"}]),
        "reasoning_effort": ([], ["none", "low"]),
        "response_format": ([{"type": "text"}, {"type": "json_object"}], [{"type": "xml"}]),
        "stream_options": ([], [{"include_usage": True}]),  # with stream only
        "tool_choice": ([], ["auto"]),  # beside tools only
        "tools": ([], [[{"type": "function", "function": FUNCTION}], []]),  # this template knows none
        "top_logprobs": ([], [2]),  # with logprobs only
        "verbosity": ([], ["medium"]),
        "web_search_options": ([], [{}]),
    }
)
COMPLETIONS = (
    SAMPLING
    | SHARED
    | {
        "best_of": ([1], [2]),
        "echo": ([True, False], ["x"]),
        "logprobs": ([0, 3], [101]),
        "max_tokens": ([5], [-1, 64]),
        "prompt": (["x", ["x", "y"], [5], [[5], [6]]], [[], 5]),
        "stream_options": ([], [{"include_usage": True}]),  # with stream only
        "suffix": ([], ["x"]),
    }
)
RESPONSES = (
    SHARED
    | ACCOUNT
    | {
        "access_programs": ([], [{"cyber": "standard"}]),
        "background": ([False], [True]),
        "background_options": ([], [{"completion_window": "soonest"}]),
        "context_management": ([], [[{"type": "compaction"}]]),
        "conversation": ([], ["conv_1", {"id": "conv_1"}]),
        "image": ([], [{"context_compression": "auto"}]),
        "include": ([[], ["message.output_text.logprobs"]], [["reasoning.encrypted_content"]]),
        "input": (["x", HELLO], [[]]),
        "instructions": (["be brief"], [5]),
        "max_output_tokens": ([5], [0, 64]),
        "max_tool_calls": ([], [1]),
        "metadata": ([{"a": "b"}, {}], [{"a": 5}]),
        "parallel_tool_calls": ([True, False], ["x"]),
        "previous_response_id": ([], ["resp_1"]),
        "prompt": ([], [{"id": "p"}]),
        "reasoning": ([], [{"effort": "none"}, {}]),
        "stream_options": ([], [{"include_obfuscation": False}]),  # with stream only
        "text": ([{}, {"format": {"type": "text"}}], [{"verbosity": "medium"}]),
        "tool_choice": (["auto", "none"], ["required"]),  # required: beside tools only
        "tools": ([[]], [[{"type": "web_search"}]]),
        "top_logprobs": ([], [2]),  # with include only
        "truncation": (["disabled"], ["auto"]),
    }
)
ROUTES = {
    "chat/completions": (
        CHAT,
        {"messages": HELLO, "max_completion_tokens": 4},
        chat_params.CompletionCreateParamsBase,
    ),
    "completions": (
        COMPLETIONS,
        {"prompt": "x", "max_tokens": 4},
        completion_params.CompletionCreateParamsBase,
    ),
    "responses": (
        RESPONSES,
        {"input": "x", "max_output_tokens": 4},
        response_params.ResponseCreateParamsBase,
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_the_table_has_every_field_of_the_client(route):
    fields, _, params = ROUTES[route]
    assert fields.keys() == params.__annotations__.keys()


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_taken(server, route):
    fields, base, _ = ROUTES[route]
    for field, (taken, _) in fields.items():
        for value in [*taken, *([None] if field not in ("model", *base) else [])]:
            body = {key: given for key, given in base.items() if "max" not in field or "max" not in key}
            response = server.post(route, **(body | {field: value}))
            assert response.status_code == 200, (field, value, response.text)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_refused(server, route):
    fields, base, _ = ROUTES[route]
    for field, (_, refused) in fields.items():
        for value in refused:
            body = {key: given for key, given in base.items() if "max" not in field or "max" not in key}
            status, error = error_of(server.post(route, **(body | {field: value})))
            assert status == 400 and error.param.split(".")[0] == field, (field, value, error)
            assert field in error.message, (field, value, error)
    assert server.engine.requests == []


@pytest.mark.parametrize("route", ROUTES)
def test_obfuscation_that_is_not_there_can_be_turned_off(server, route):
    base = ROUTES[route][1] | {"stream": True}
    off = server.post(route, **base, stream_options={"include_obfuscation": False})
    assert off.status_code == 200 and "obfuscation" not in off.text
    status, error = error_of(server.post(route, **base, stream_options={"include_obfuscation": True}))
    assert (status, error.param) == (400, "stream_options")


def test_the_tier_is_told_where_it_was_asked_for(server):
    assert server.chat(service_tier="auto").service_tier == "default"
    assert server.chat().service_tier is None


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_taken_is_what_the_document_says(server, route):
    fields, base, _ = ROUTES[route]
    document = server.http.get("/openapi.json").json()
    content = document["paths"][f"/v1/{route}"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"] | {"components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    for field, (taken, _) in fields.items():
        for value in taken:
            validator.validate({"model": "fake"} | base | {field: value})
