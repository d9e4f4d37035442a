"""The OpenAI routes over a real uvicorn, a small tokenizer, and a fake engine."""

import contextlib
import json

import httpx
import openai
import pytest
from fake_server import ANSWER, HELLO, Server, error_of, until

from ds_serve.messages import Stats

# -- answers -----------------------------------------------------------------------------------


def test_chat_answer(server):
    answer = server.chat()
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        ANSWER,
        "stop",
    )
    assert answer.object == "chat.completion" and answer.model == "fake" and answer.id.startswith("chatcmpl-")
    sent = server.engine.requests[0]
    assert server.codec.decode(sent.prompt_token_ids, False) == "<s>user:hello</s>assistant:"
    tokens = len(server.codec.encode(ANSWER)) + 1
    assert answer.usage.prompt_tokens == len(sent.prompt_token_ids)
    assert answer.usage.completion_tokens == tokens
    assert answer.usage.total_tokens == tokens + len(sent.prompt_token_ids)
    details = answer.usage.prompt_tokens_details
    assert (details.cached_tokens, details.host_cached_tokens) == (2, 1)


def test_chat_stream(server):
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1 and {c.object for c in chunks} == {
        "chat.completion.chunk"
    }


def test_stream_is_server_sent_events(server):
    response = server.post("chat/completions", messages=HELLO, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_completions_of_every_prompt_form(server):
    ids = server.codec.encode("hello")
    for prompt, sent in [("hello", [ids]), (["hello", "world"], 2), (ids, [ids]), ([ids, [5]], [ids, [5]])]:
        server.engine.requests.clear()
        answer = server.openai.completions.create(model="fake", prompt=prompt, max_tokens=4)
        prompts = [request.prompt_token_ids for request in server.engine.requests]
        assert prompts == sent or len(prompts) == sent
        assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.choices[0].text == server.codec.decode(server.codec.encode(ANSWER)[:4])
        assert answer.usage.completion_tokens == 4 * len(prompts)
        assert answer.usage.prompt_tokens == sum(map(len, prompts)) and answer.object == "text_completion"


def test_n_choices_have_seeds_of_their_own_and_a_common_prompt(server):
    answer = server.chat(n=3, seed=5, max_completion_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.params.seed for request in server.engine.requests) == [5, 6, 7]
    assert answer.usage.prompt_tokens == len(server.engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == 9
    details = answer.usage.prompt_tokens_details
    assert (details.cached_tokens, details.host_cached_tokens) == (2, 1)
    chunks = list(server.chat(n=2, stream=True, max_tokens=3))
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1]
    assert sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason) == [0, 1]


def test_seed_is_drawn_where_none_is_given(server):
    server.chat()
    server.chat()
    assert len({request.params.seed for request in server.engine.requests}) == 2


def test_parameters_reach_the_engine(server):
    extra = {
        "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True,
        "priority": -1, "stop_token_ids": [9], "cache_salt": "tenant",
        "chat_template_kwargs": {"mood": "glad"},
    }  # fmt: skip
    server.chat(
        temperature=0, top_p=0.5, presence_penalty=1, frequency_penalty=-1, logit_bias={"7": 5}, max_tokens=6,
        user="someone", extra_body=extra,
    )  # fmt: skip
    request = server.engine.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 3, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.2)
    assert (params.logit_bias, params.stop_token_ids, params.eos_token_ids) == ({7: 5}, (9,), (1,))
    assert (params.min_tokens, params.max_tokens, params.ignore_eos) == (2, 6, True)
    assert (request.salt, request.priority, request.cache_key) == ("tenant", -1, "")
    assert "glad" in server.codec.decode(request.prompt_token_ids)


def test_defaults_are_the_models_then_openais(server):
    server.post("completions", prompt="hello")
    server.post("chat/completions", messages=HELLO, temperature=None)
    completion, chat = (request.params for request in server.engine.requests)
    assert (completion.temperature, completion.top_k, completion.top_p) == (0.7, 20, 1.0)
    assert completion.max_tokens == 16
    assert chat.max_tokens == 64 - len(server.engine.requests[1].prompt_token_ids)


def test_final_message_is_continued(server):
    messages = HELLO + [{"role": "assistant", "content": [{"type": "text", "text": "hello wor"}]}]
    server.chat(messages=messages, extra_body={"continue_final_message": True})
    assert server.codec.decode(server.engine.requests[0].prompt_token_ids).endswith("assistant:hello wor")


# -- prefixes that stay ------------------------------------------------------------------------


def test_a_cache_key_reaches_the_engine_as_a_hint(server):
    server.post("completions", prompt="hello", prompt_cache_key="doc/1", cache_salt="a")
    server.post("chat/completions", messages=HELLO, prompt_cache_key="doc/1", prompt_cache_ttl=60)
    server.post("completions", prompt="hello", prompt_cache_key=None, prompt_cache_ttl=None)
    asked = [(r.cache_key, r.cache_ttl, r.pin, r.salt) for r in server.engine.requests]
    assert asked == [("doc/1", 300, "hint", "a"), ("doc/1", 60, "hint", ""), ("", 300, "hint", "")]


def test_choices_of_one_prompt_pin_it_once(server):
    server.post("completions", prompt=["hello", "world"], n=3, prompt_cache_key="k")
    assert [request.cache_key for request in server.engine.requests] == ["k", "", "", "k", "", ""]


def test_a_cache_key_is_released_under_its_salt(server):
    for path in ("doc%2F1?cache_salt=a%26b", "d%C3%B6c", "doc/1"):
        response = server.http.delete(f"/v1/cache/{path}")
        assert (response.status_code, response.content) == (204, b"")
    until(lambda: len(server.engine.unpinned) == 3)
    released = [(message.cache_key, message.salt) for message in server.engine.unpinned]
    assert released == [("doc/1", "a&b"), ("döc", ""), ("doc/1", "")]


def test_the_openapi_document_explains_the_cache(server):
    document = server.http.get("/openapi.json").json()
    for body in ("ChatBody", "CompletionBody"):
        fields = document["components"]["schemas"][body]["properties"]
        assert "newer prompt" in fields["prompt_cache_key"]["description"]
        assert (fields["prompt_cache_ttl"]["minimum"], fields["prompt_cache_ttl"]["maximum"]) == (1, 86400)
        assert "salt" in fields["cache_salt"]["description"]
    [release] = [route for path, route in document["paths"].items() if path.startswith("/v1/cache/")]
    assert "204" in release["delete"]["responses"] and release["delete"]["description"]


# -- stop strings and logprobs -----------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_text_usage_and_request(server, stream):
    server.engine.step_s = 0.02
    body = {"messages": HELLO, "stop": [", \U0001f642", "xx"], "stream": stream}
    if stream:
        chunks = list(server.chat(**body, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
        reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        answer = server.chat(**body)
        text, reason, usage = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    assert (text, reason) == ("hello there", "stop")
    assert usage.completion_tokens == len(server.codec.encode("hello there, 🙂"))
    until(lambda: server.engine.aborted == [server.engine.requests[0].id])


def test_stop_of_one_choice_leaves_the_other(server):
    server.engine.step_s = 0.01
    server.reply = lambda request: server.codec.encode(
        "hello world" if request.params.seed else "no END of it"
    )
    answer = server.chat(n=2, seed=0, stop="END")
    assert [choice.message.content for choice in answer.choices] == ["no ", "hello world"]
    until(lambda: len(server.engine.aborted) == 1)


def test_stop_token_has_no_text_but_counts(server):
    server.reply = lambda request: server.codec.encode("hello")
    answer = server.chat(extra_body={"stop_token_ids": [1], "ignore_eos": True})
    assert answer.choices[0].message.content == "hello" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(server.codec.encode("hello")) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(server, stream):
    answer = server.chat(logprobs=True, top_logprobs=2, stop=["wor"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().startswith("hello there, 🙂 w")
    assert entries[0].logprob == -0.5 and entries[0].top_logprobs[1].logprob == -9999.0


def test_completion_logprobs(server):
    answer = server.openai.completions.create(model="fake", prompt="hello", logprobs=1, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text and logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    assert logprobs.top_logprobs[0] == {logprobs.tokens[0]: -0.5}


# -- clients that leave, and services ----------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_away_aborts_its_requests(server, stream, n):
    server.engine.step_s = 0.05
    body = {"model": "fake", "messages": HELLO, "stream": stream, "n": n}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(base_url=server.url, timeout=0.3) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        next(response.iter_lines())
    until(lambda: sorted(server.engine.aborted) == sorted(request.id for request in server.engine.requests))
    assert len(server.engine.aborted) == n


def test_a_client_that_goes_away_before_the_first_token_aborts(server):
    server.engine.hold.set()
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.2) as client:
        client.post("/v1/chat/completions", json={"model": "fake", "messages": HELLO, "stream": True})
    until(lambda: server.engine.aborted)


def test_services(server):
    assert [model.id for model in server.openai.models.list()] == ["fake"]
    assert server.openai.models.retrieve("fake").max_model_len == 64
    assert error_of(server.http.get("/v1/models/other"))[0] == 404
    health = server.http.get("/health").json()
    assert health["status"] == "ok" and health["engine"]["num_blocks"] == 9
    stats = health["stats"]
    assert stats["num_running"] == 0
    assert (stats["num_pinned_blocks"], stats["cached_tokens_host"], stats["load_s"]) == (3, 5, 0.25)
    numbers = {name: value for name, value in stats.items() if name != "stage_busy_s"}
    assert numbers.keys() == set(Stats.__struct_fields__) - {"stage_busy_s"}
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    assert server.http.get("/version").json()["version"]


def test_a_long_prompt_is_encoded_off_the_loop(server):
    status, error = error_of(server.post("completions", prompt="hello " * 5000))
    assert status == 400 and error.code == "context_length_exceeded"


# -- the engine's death (last: the server of its own) ------------------------------------------


def test_engine_death_ends_streams_and_is_a_503_after(codec, tmp_path):
    server = Server(codec, tmp_path)
    server.start()
    try:
        server.engine.step_s = 0.05
        stream = server.chat(stream=True)
        next(stream)
        server.engine._leaving = "out of memory"
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)
        with pytest.raises(openai.APIStatusError) as caught:
            server.chat()
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "7"
        for method, route in (("GET", "/health"), ("GET", "/v1/models"), ("DELETE", "/v1/cache/k")):
            response = server.http.request(method, route)
            assert error_of(response)[0] == 503 and "out of memory" in response.text
    finally:
        server.stop()
