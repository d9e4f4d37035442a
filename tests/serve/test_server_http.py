"""The OpenAI routes over a real uvicorn, a small tokenizer, and a fake engine."""

import asyncio
import contextlib
import json
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from fake_engine import FakeEngine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ds_serve.server.app import create_app
from ds_serve.server.client import EngineClient
from ds_serve.server.front import Front
from ds_serve.server.run import _listen
from ds_serve.text.codec import TextCodec
from ds_serve.text.defaults import GenerationDefaults

ANSWER = "hello there, 🙂 world"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world, hello there"], trainer)
    path = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(path)
    return TextCodec(path)


class Server:
    """uvicorn, client and fake engine; the first two on a loop in a thread of their own."""

    def __init__(self, codec, folder):
        self.codec, self.folder = codec, folder
        self.defaults = GenerationDefaults(eos_token_ids=(1,), temperature=0.7, top_k=20)
        self.engine = FakeEngine(
            folder, lambda request: self.reply(request), refusal=lambda r: self.refusal(r)
        )
        self._up, self._down = threading.Event(), None
        self.reset()

    def reset(self):
        self.reply = lambda request: self.codec.encode(ANSWER)
        self.refusal = lambda request: None
        self.engine.requests.clear()
        self.engine.aborted.clear()
        self.engine.hold.clear()
        self.engine.step_s = 0.0

    def start(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._up.wait(20)
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=20)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def stop(self):
        self.engine.leave("test over")
        self._down()
        self._thread.join(10)

    async def _main(self):
        client = EngineClient(self.folder)
        await client.start()
        self.engine.start()
        await client.wait_ready()
        front = Front("fake", self.defaults, Backend(client), created=1, codec=self.codec)
        socket = _listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(create_app(front), log_level="warning", lifespan="off"))
        server.capture_signals = contextlib.nullcontext
        loop = asyncio.get_running_loop()
        self._down = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        self._up.set()
        await server.serve(sockets=[socket])
        await client.close()

    def post(self, route, **body):
        return self.http.post(f"/v1/{route}", json={"model": "fake"} | body)

    def chat(self, **body):
        return self.openai.chat.completions.create(**({"model": "fake", "messages": HELLO} | body))


class Backend:
    retry_after_s = 7

    def __init__(self, client):
        self._client = client

    @property
    def client(self):
        self._client.check()
        return self._client


@pytest.fixture(scope="module")
def running(codec, tmp_path_factory):
    server = Server(codec, tmp_path_factory.mktemp("ipc"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running):
    running.reset()
    return running


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def error_of(response):
    return response.status_code, SimpleNamespace(**response.json()["error"])


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
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


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
    assert answer.usage.completion_tokens == 9 and answer.usage.prompt_tokens_details.cached_tokens == 2
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
    assert (request.salt, request.priority) == ("tenant", -1)
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


# -- refusals ----------------------------------------------------------------------------------

REFUSED = [
    ({"frobnicate": 1}, "frobnicate", "frobnicate"),
    ({"tools": []}, "tools", "not supported"),
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
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": "x", "logprobs": 101}, "logprobs"),
        ({}, "prompt"),
    ],
    ids=str,
)
def test_bad_completion_is_a_400_that_names_the_field(server, body, param):
    status, error = error_of(server.post("completions", **body))
    assert status == 400 and error.param == param and param in error.message


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
    assert health["stats"]["num_running"] == 0
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
        for route in ("/health", "/v1/models"):
            response = server.http.get(route)
            assert error_of(response)[0] == 503 and "out of memory" in response.text
    finally:
        server.stop()
