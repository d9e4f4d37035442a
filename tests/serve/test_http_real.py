"""The real server on the demo model, as a client sees it: `python -m ds_serve serve`, and openai's client."""

import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from real_server import CHAT, Server, text_of, until

from ds_serve import demo
from ds_serve.text.codec import TextCodec


def test_streamed_text_is_the_answers_text(real):
    answer = real.chat()
    text = answer.choices[0].message.content
    assert text and text_of(real.chat(stream=True)) == text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 1 <= answer.usage.completion_tokens <= 24


def test_chat_is_the_completion_of_its_rendered_prompt(real):
    codec = TextCodec(demo.model_path())
    ids = codec.encode_chat(CHAT)
    answer = real.chat()
    completion = real.openai.completions.create(model="demo", prompt=ids, temperature=0, max_tokens=24)
    assert completion.choices[0].text == answer.choices[0].message.content
    assert completion.usage.prompt_tokens == answer.usage.prompt_tokens == len(ids)


def test_second_prompt_of_a_kind_is_read_from_the_cache(real):
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog. " * 8}]
    first, second, salted = (
        real.chat(messages=messages, max_tokens=4, extra_body=extra)
        for extra in ({}, {}, {"cache_salt": "other tenant"})
    )
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, salted)]
    assert cached[0] == 0 == cached[2] and cached[1] >= first.usage.prompt_tokens // 2
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_seeds_text_does_not_depend_on_company(real):
    body = {"temperature": 2.0, "seed": 11, "extra_body": {"ignore_eos": True}}
    alone = real.chat(**body).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        company = [pool.submit(real.chat, temperature=1.0, n=2) for _ in range(7)]
        assert pool.submit(real.chat, **body).result().choices[0].message.content == alone
        assert all(choice.message.content is not None for o in company for choice in o.result().choices)
    others = {real.chat(**(body | {"seed": seed})).choices[0].message.content for seed in range(12, 16)}
    assert others != {alone}


def test_stop_string_cuts_the_greedy_text(real):
    whole = real.chat(extra_body={"ignore_eos": True})
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for stream in (False, True):
        answer = real.chat(stop=[stop], stream=stream, extra_body={"ignore_eos": True})
        cut = text_of(answer) if stream else answer.choices[0].message.content
        assert cut == text[: text.index(stop)]
    until(lambda: real.stats()["num_running"] == 0)


def test_logprobs_of_greedy_tokens_are_the_best(real):
    answer = real.chat(logprobs=True, top_logprobs=3)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3


def test_a_client_that_leaves_frees_its_blocks(real):
    body = {"model": "demo", "messages": CHAT, "stream": True, "n": 4, "ignore_eos": True}
    with httpx.stream("POST", real.url + "/v1/chat/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    until(lambda: real.stats()["num_running"] == 0 and real.stats()["num_waiting"] == 0)
    until(lambda: real.stats()["num_free_blocks"] == real.stats()["num_blocks"])


def test_refusals_reach_the_client(real):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        real.chat(temperature=-1)
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        real.chat(extra_body={"frobnicate": 1})
    with pytest.raises(openai.NotFoundError, match="'other'"):
        real.chat(model="other")
    with pytest.raises(openai.BadRequestError, match="at most"):
        real.openai.completions.create(model="demo", prompt=[5] * 100_000)


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mortal") / "log")
    yield server
    server.process.kill()
    server.process.wait(10)


def test_a_killed_engine_is_started_again(mortal):
    engine = mortal.engine()
    stream = mortal.chat(stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    next(stream)
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    until(lambda: not engine.is_running())
    with pytest.raises(openai.InternalServerError) as refused:
        mortal.chat()
    assert refused.value.status_code == 503 and int(refused.value.response.headers["retry-after"]) > 0
    until(lambda: httpx.get(mortal.url + "/health", timeout=10).status_code == 200, seconds=90)
    assert mortal.chat().choices[0].message.content
    assert mortal.engine().pid != engine.pid


def test_a_killed_front_leaves_no_engine(mortal):
    """Even SIGKILL of the server ends its engine, idle or at work."""
    engine = mortal.engine()
    stream = mortal.chat(stream=True, max_tokens=500, extra_body={"ignore_eos": True})
    next(stream)
    mortal.process.kill()
    mortal.process.wait(10)
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, seconds=10)
