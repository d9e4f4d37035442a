"""OpenAI's own client where things go wrong: its classes of errors, its timeouts, and what it tries again."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import psutil
import pytest
from asked import ANSWER, GREEDY, ITALY, KEY, LONG, MAX_RUNNING, MAX_WAITING, City
from started import until

ASK = {"model": "demo", "messages": ITALY, **GREEDY}


@pytest.fixture(scope="module")
def client(base_url):
    with openai.OpenAI(base_url=base_url, api_key=KEY, timeout=60, max_retries=0) as client:
        yield client


def ask(client, **body):
    return client.chat.completions.create(**ASK | body)


def stats(server):
    return httpx.get(f"{server.url}/health", headers={"Authorization": f"Bearer {KEY}"}).json()["stats"]


def idle(server):
    found = stats(server)
    return not found["num_running"] + found["num_waiting"]


@pytest.mark.parametrize(
    ("kind", "status", "change", "param"),
    [
        (openai.BadRequestError, 400, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, 400, {"extra_body": {"frobnicate": 1}}, "frobnicate"),
        (openai.BadRequestError, 400, {"messages": []}, "messages"),
        (openai.BadRequestError, 400, {"max_tokens": 0}, "max_tokens"),
        (openai.NotFoundError, 404, {"model": "gpt-4o"}, "model"),
    ],
)
def test_a_refusal_has_its_class_and_its_parameter(client, kind, status, change, param):
    with pytest.raises(kind) as refused:
        ask(client, **change)
    error = refused.value
    assert (error.status_code, error.param, error.type) == (status, param, "invalid_request_error")
    assert param in error.message


def test_a_wrong_key(client):
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="sk-wrong").models.list()
    assert refused.value.code == "invalid_api_key" and "sk-wrong" not in refused.value.message


def test_an_impossible_schema(client):
    impossible = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        ask(client, response_format=impossible)


def test_a_prompt_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt=[5] * 10_000)
    assert refused.value.code == "context_length_exceeded"


def test_nobody_there():
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_clients_timeout_ends_the_request_for_the_engine_too(client, server, base_url):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3), **LONG)
    until(lambda: idle(server))

    async def late():
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as client:
            await client.chat.completions.create(**ASK | LONG, timeout=0.3)

    with pytest.raises(openai.APITimeoutError):
        asyncio.run(late())
    until(lambda: idle(server) and stats(server)["num_free_blocks"] == stats(server)["num_blocks"])


def test_a_stream_that_is_left_ends_for_the_engine_too(client, server):
    with ask(client, stream=True, **LONG) as stream:
        next(iter(stream))
    until(lambda: idle(server))


def test_the_servers_time_limit(client):
    with pytest.raises(openai.InternalServerError) as late:
        ask(client, **LONG, extra_headers={"X-Request-Timeout": "0.2"})
    assert late.value.status_code == 504 and late.value.code == "timeout"


# -- what is tried again ---------------------------------------------------------------------------


class Statuses:
    """The statuses that a client's requests got, in order; on_status is called at each."""

    def __init__(self, on_status=lambda status: None):
        self.seen, self.on_status = [], on_status
        self.http = httpx.Client(event_hooks={"response": [self._note]})

    def _note(self, response):
        self.seen.append(response.status_code)
        self.on_status(response.status_code)


def fill(stack, client, server):
    """Takes every place, running or waiting, until stack is closed."""
    threads = stack.enter_context(ThreadPoolExecutor(MAX_WAITING))
    for _ in range(MAX_RUNNING):
        stream = stack.enter_context(ask(client, stream=True, **LONG))
        next(iter(stream))
    for _ in range(MAX_WAITING):
        threads.submit(ask, client)
    until(lambda: stats(server)["num_waiting"] == MAX_WAITING)


def test_a_full_queue_is_tried_again_until_there_is_room(client, server, base_url):
    with ExitStack() as streams:
        fill(streams, client, server)
        with pytest.raises(openai.RateLimitError) as full:
            ask(client)
        assert int(full.value.response.headers["retry-after"]) > 0
        statuses = Statuses(lambda status: streams.close())
        with openai.OpenAI(
            base_url=base_url, api_key=KEY, max_retries=5, http_client=statuses.http
        ) as patient:
            assert ANSWER in ask(patient).choices[0].message.content
    assert statuses.seen[0] == 429 and statuses.seen[-1] == 200
    until(lambda: idle(server))


def test_an_engine_that_starts_again_is_waited_for(client, server, base_url):
    """By a client that tries again as often as it takes; meanwhile others are told why."""
    stream = iter(ask(client, stream=True, **LONG))
    next(stream)
    [engine] = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "ds_serve.rank" in process.cmdline()
    ]
    engine.kill()
    with pytest.raises(openai.APIError):
        list(stream)
    with pytest.raises(openai.InternalServerError) as gone:
        ask(client)
    assert gone.value.status_code == 503 and int(gone.value.response.headers["retry-after"]) > 0
    statuses = Statuses()
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=60, http_client=statuses.http) as patient:
        parsed = patient.chat.completions.parse(**ASK | {"max_tokens": 60, "response_format": City})
    assert isinstance(parsed.choices[0].message.parsed, City)
    assert set(statuses.seen[:-1]) == {503} and statuses.seen[-1] == 200


def test_errors_are_of_openais_shape(base_url):
    """Whatever the path, the method or the body."""
    with httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {KEY}"}) as http:
        answers = [
            http.get("/nothing"),
            http.delete("/models"),
            http.post("/chat/completions", content=b"{"),
            http.post("/chat/completions", json=[1]),
            http.get("/models", headers={"Authorization": "Basic abc"}),
        ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 400, 401]
    for answer in answers:
        error = json.loads(answer.text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
