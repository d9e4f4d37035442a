"""The real server on the demo model, as a client sees it: `python -m ds_serve serve`, and openai's client."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from ds_serve import demo
from ds_serve.text.codec import TextCodec

CHAT = [{"role": "user", "content": "Hello, who are you?"}]


class Server:
    """One server process and clients for it; its errors are in the file `log`."""

    def __init__(self, model, log):
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ds_serve", "serve", str(model), "--port", "0", "--num-blocks", "256"]
                + ["--served-model-name", "demo", "--dtype", "float32"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
            )
        self.url = self._ready_url()
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def _ready_url(self):
        for line in self.process.stdout:
            found = re.search(r"is served on (http://\S+)/v1", line)
            if found:
                return found[1]
        raise AssertionError(self.log.read_text())

    def chat(self, **body):
        body = {"model": "demo", "messages": CHAT, "temperature": 0, "max_tokens": 24} | body
        return self.openai.chat.completions.create(**body)

    def stats(self):
        return httpx.get(self.url + "/health", timeout=10).json()["stats"]

    def engine(self):
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "ds_serve.rank" in child.cmdline())

    def stop(self):
        """Ends it by SIGTERM; asserts that it leaves nothing."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(demo.model_path(), tmp_path_factory.mktemp("serve") / "log")
    yield running
    running.stop()


def text_of(stream):
    chunks = [chunk for chunk in stream if chunk.choices]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_streamed_text_is_the_answers_text(server):
    answer = server.chat()
    text = answer.choices[0].message.content
    assert text and text_of(server.chat(stream=True)) == text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 1 <= answer.usage.completion_tokens <= 24


def test_chat_is_the_completion_of_its_rendered_prompt(server):
    codec = TextCodec(demo.model_path())
    ids = codec.encode_chat(CHAT)
    answer = server.chat()
    completion = server.openai.completions.create(model="demo", prompt=ids, temperature=0, max_tokens=24)
    assert completion.choices[0].text == answer.choices[0].message.content
    assert completion.usage.prompt_tokens == answer.usage.prompt_tokens == len(ids)


def test_second_prompt_of_a_kind_is_read_from_the_cache(server):
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog. " * 8}]
    first, second, salted = (
        server.chat(messages=messages, max_tokens=4, extra_body=extra)
        for extra in ({}, {}, {"cache_salt": "other tenant"})
    )
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, salted)]
    assert cached[0] == 0 == cached[2] and cached[1] >= first.usage.prompt_tokens // 2
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_seeds_text_does_not_depend_on_company(server):
    body = {"temperature": 2.0, "seed": 11, "extra_body": {"ignore_eos": True}}
    alone = server.chat(**body).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        company = [pool.submit(server.chat, temperature=1.0, n=2) for _ in range(7)]
        assert pool.submit(server.chat, **body).result().choices[0].message.content == alone
        assert all(choice.message.content is not None for o in company for choice in o.result().choices)
    others = {server.chat(**(body | {"seed": seed})).choices[0].message.content for seed in range(12, 16)}
    assert others != {alone}


def test_stop_string_cuts_the_greedy_text(server):
    whole = server.chat(extra_body={"ignore_eos": True})
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for stream in (False, True):
        answer = server.chat(stop=[stop], stream=stream, extra_body={"ignore_eos": True})
        cut = text_of(answer) if stream else answer.choices[0].message.content
        assert cut == text[: text.index(stop)]
    until(lambda: server.stats()["num_running"] == 0)


def test_logprobs_of_greedy_tokens_are_the_best(server):
    answer = server.chat(logprobs=True, top_logprobs=3)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3


def test_a_client_that_leaves_frees_its_blocks(server):
    body = {"model": "demo", "messages": CHAT, "stream": True, "n": 4, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    until(lambda: server.stats()["num_running"] == 0 and server.stats()["num_waiting"] == 0)
    until(lambda: server.stats()["num_free_blocks"] == server.stats()["num_blocks"])


def test_refusals_reach_the_client(server):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.chat(temperature=-1)
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        server.chat(extra_body={"frobnicate": 1})
    with pytest.raises(openai.NotFoundError, match="'other'"):
        server.chat(model="other")
    with pytest.raises(openai.BadRequestError, match="at most"):
        server.openai.completions.create(model="demo", prompt=[5] * 100_000)
    with pytest.raises(openai.BadRequestError, match="echo"):
        server.openai.completions.create(model="demo", prompt="x", echo=True)


def test_a_killed_engine_is_started_again(server):
    """Last: it costs one start of the engine."""
    engine = server.engine()
    stream = server.chat(stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    next(stream)
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    until(lambda: not engine.is_running())
    with pytest.raises(openai.InternalServerError) as refused:
        server.chat()
    assert refused.value.status_code == 503 and int(refused.value.response.headers["retry-after"]) > 0
    until(lambda: httpx.get(server.url + "/health", timeout=10).status_code == 200, seconds=90)
    assert server.chat().choices[0].message.content
    assert server.engine().pid != engine.pid


def test_a_killed_front_leaves_no_engine(tmp_path):
    """Even SIGKILL of the server ends its engine, idle or at work."""
    server = Server(demo.model_path(), tmp_path / "log")
    engine = server.engine()
    stream = server.chat(stream=True, max_tokens=500, extra_body={"ignore_eos": True})
    next(stream)
    server.process.kill()
    server.process.wait(10)
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, seconds=10)
