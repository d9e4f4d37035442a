"""Many clients at once on the real server: some leave, one hardly reads, too many are turned away."""

import asyncio
import json
import socket
from contextlib import suppress

import aiohttp
import pytest
from real_server import Server, until

NUM_STREAMS = 256
MAX_TOKENS = 40
QUESTIONS = ["What is the capital of Italy?", "Tell me about the moon.", "What is 3 + 4?", "Who are you?"]
MAX_QUEUE = 256


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """64 at once, whose answers need twice the blocks that there are, and a queue for 256 more."""
    server = Server(
        tmp_path_factory.mktemp("crowd") / "log", "--num-blocks", "192", "--max-queue", str(MAX_QUEUE)
    )
    yield server
    server.stop()


def body(index, **fields):
    question = {"role": "user", "content": f"{QUESTIONS[index % len(QUESTIONS)]} {index // 8}"}
    common = {"model": "demo", "messages": [question], "temperature": 0.0, "ignore_eos": True}
    return common | {"max_tokens": MAX_TOKENS, "stream": True} | fields


async def stream(session, url, fields, leave_after=None):
    """(status, text, finish_reason, headers); leave_after: chunks after which it hangs up."""
    text, reason, count = "", None, 0
    async with session.post(url + "/v1/chat/completions", json=fields) as response:
        if response.status != 200:
            return response.status, await response.json(), None, response.headers
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            choice = event["choices"][0]
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            count += 1
            if leave_after is not None and count > leave_after:
                return response.status, text, None, response.headers
    return response.status, text, reason, response.headers


def run(*calls):
    """All at once; each is given a session without limits."""

    async def main():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
            return await asyncio.gather(*(call(session) for call in calls))

    return asyncio.run(main())


class SlowReader:
    """Asks by hand, takes a byte a second, and what is left in finish(), which gives the choices' texts."""

    def __init__(self, url, fields):
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((host, int(port)))
        payload = json.dumps(fields).encode()
        self._socket.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(payload), payload)
        )
        self.data = b""

    async def read(self, until_done):
        loop = asyncio.get_running_loop()
        while not until_done.is_set():
            self.data += await loop.run_in_executor(None, self._socket.recv, 1)
            with suppress(TimeoutError):
                await asyncio.wait_for(until_done.wait(), 1)

    def finish(self):
        while part := self._socket.recv(65536):
            self.data += part
        self._socket.close()
        lines = self.data.split(b"\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert b"data: [DONE]" in self.data
        texts = {}
        for choice in (event["choices"][0] for event in events):
            text = choice["delta"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
        return [texts[index] for index in sorted(texts)]


def test_256_streams_of_which_some_leave_and_one_hardly_reads(crowded):
    url = crowded.url
    wanted = [result[1] for result in run(*(lambda s, i=i: stream(s, url, body(i)) for i in range(16)))]
    assert all(wanted)
    # Megabytes, which no buffer on the way holds.
    slow = SlowReader(url, body(3, n=2, max_tokens=500, logprobs=True, top_logprobs=20))
    is_over = asyncio.Event()
    leaving = set(range(5, NUM_STREAMS, 10))

    async def everybody(session):
        calls = [stream(session, url, body(i), i % 30 if i in leaving else None) for i in range(NUM_STREAMS)]
        results = await asyncio.gather(*calls)
        is_over.set()
        return results

    results, _ = run(everybody, lambda session: slow.read(is_over))
    for index, (status, text, reason, _) in enumerate(results):
        assert status == 200
        if index not in leaving:
            assert reason == "length" and text
            if index < len(wanted):
                assert text == wanted[index]
    assert len(slow.data) < 200, "the slow reader was as fast as others"
    assert [text[: len(wanted[3])] for text in slow.finish()] == [wanted[3]] * 2
    assert len(slow.data) > 2**20
    stats = crowded.stats()
    assert stats["num_preemptions"] > 0
    until(lambda: crowded.stats()["num_running"] == crowded.stats()["num_waiting"] == 0)
    stats = crowded.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]


def test_a_full_queue_turns_away_with_429_and_nothing_else(crowded):
    url = crowded.url
    results = run(*(lambda s, i=i: stream(s, url, body(i, max_tokens=24)) for i in range(600)))
    statuses = [status for status, *_ in results]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= MAX_QUEUE
    for status, answer, reason, headers in results:
        if status == 429:
            assert answer["error"]["type"] == "rate_limit_error" and int(headers["Retry-After"]) >= 1
        else:
            assert reason == "length"
    stats = crowded.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"] and stats["num_running"] == 0
