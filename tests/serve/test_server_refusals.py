"""What the routes refuse, with which status and in which words, of their own and for the engine."""

import openai
import pytest
from fake_server import HELLO, error_of

REFUSED = [
    ({"frobnicate": 1}, "frobnicate", "frobnicate"),
    ({"tools": []}, "tools", "at least 1"),
    ({"temperature": -1}, "temperature", "at least 0"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "in (0, 1]"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"stop": ""}, "stop", "non-empty"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": "x" * 1025}, "stop", "1024 characters"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"4000": 1}}, "logit_bias", "vocabulary of 400"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "vocabulary"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "max_tokens (3)"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 60}, "max_tokens", "64"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs is true"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    ({"prompt_cache_key": "x" * 257}, "prompt_cache_key", "at most 256"),
    ({"prompt_cache_key": 7}, "prompt_cache_key", "string"),
    ({"prompt_cache_key": "k", "prompt_cache_ttl": 0.5}, "prompt_cache_ttl", "greater than or equal to 1"),
    ({"prompt_cache_key": "k", "prompt_cache_ttl": 86401}, "prompt_cache_ttl", "less than or equal to 86400"),
    ({"prompt_cache_key": "k", "prompt_cache_ttl": "5m"}, "prompt_cache_ttl", "number"),
    ({"prompt_cache_ttl": 60}, "prompt_cache_ttl", "prompt_cache_key is given"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "'system'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "excludes"),
]


@pytest.mark.parametrize("body, param, words", REFUSED, ids=lambda value: str(value)[:30])
def test_bad_chat_is_a_400_that_names_the_field(server, body, param, words):
    status, error = error_of(server.post("chat/completions", **({"messages": HELLO} | body)))
    assert status == 400 and error.type == "invalid_request_error"
    assert error.param.split(".")[0] == param and param in error.message and words in error.message
    assert server.engine.requests == []


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": "x", "logprobs": 101}, "logprobs"),
        ({"prompt": "x", "prompt_cache_key": "x" * 257}, "prompt_cache_key"),
        ({"prompt": "x", "prompt_cache_ttl": 60}, "prompt_cache_ttl"),
        ({}, "prompt"),
    ],
    ids=str,
)
def test_bad_completion_is_a_400_that_names_the_field(server, body, param):
    status, error = error_of(server.post("completions", **body))
    assert status == 400 and error.param == param and param in error.message


@pytest.mark.parametrize(
    "fields, param",
    [
        (b'"prompt_cache_key": "\\ud800"', "prompt_cache_key"),
        (b'"prompt_cache_key": "k", "prompt_cache_ttl": NaN', "prompt_cache_ttl"),
    ],
)
def test_what_json_can_spell_and_we_cannot_take_is_a_400(server, fields, param):
    body = b'{"model": "fake", "prompt": "hello", ' + fields + b"}"
    status, error = error_of(
        server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    )
    assert (status, error.param) == (400, param) and server.engine.requests == []


def test_a_cache_key_that_cannot_be_is_a_400_that_names_it(server):
    for key, words in [("x" * 257, "at most 256"), ("", "at least 1")]:
        status, error = error_of(server.http.delete(f"/v1/cache/{key}"))
        assert (status, error.param) == (400, "prompt_cache_key") and words in error.message
    assert server.engine.unpinned == []


def test_a_prompt_too_long_is_told_both_numbers(server):
    for stream in (False, True):
        status, error = error_of(server.post("completions", prompt=[5] * 70, stream=stream))
        assert status == 400 and error.code == "context_length_exceeded"
        assert "70" in error.message and "64" in error.message


def test_other_refusals_have_openais_shape(server):
    status, error = error_of(server.post("chat/completions", messages=HELLO, model="other"))
    assert (status, error.code) == (404, "model_not_found") and "'fake'" in error.message
    for headers in ({}, {"Content-Type": "application/json"}):
        status, error = error_of(server.http.post("/v1/completions", content="{no json", headers=headers))
        assert status == 400 and "JSON" in error.message
        surrogate = b'{"model": "fake", "prompt": "\\ud800"}'
        assert error_of(server.http.post("/v1/completions", content=surrogate, headers=headers))[0] == 400
    assert error_of(server.http.get("/v1/nothing"))[0] == 404
    assert error_of(server.http.get("/v1/completions"))[0] == 405
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        server.chat(extra_body={"frobnicate": 1})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text, status",
    [("too long: x", 400), ("can never fit: x", 400), ("the queue is full: x", 429), ("odd", 500)],
)
def test_the_engines_refusal_has_a_status(server, stream, text, status):
    server.refusal = lambda request: text
    response = server.post("completions", prompt="hello", stream=stream)
    assert error_of(response)[0] == status and text in response.json()["error"]["message"]
    assert ("retry-after" in response.headers) == (status == 429)
