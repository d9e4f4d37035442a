"""What `ds-serve bench` costs itself: processor time a streamed event and a request, without a model.

    python benchmarks/bench_client.py --streams 64

A process of its own answers with events made beforehand: each open stream gets one event every --step-ms, as
a server's steps would give it, so that events come one by one. The client's processor time over its events
and requests, in one JSON line; 1e6 / us_an_event is what one core of client could read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time

from ds_serve.bench.client import Client
from ds_serve.bench.endpoints import endpoint
from ds_serve.bench.load import Load
from ds_serve.bench.options import Options
from ds_serve.bench.prompts import Prompt
from ds_serve.bench.run import _fast_loop

EVENT = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1790000000,
    "model": "demo",
    "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
    "usage": None,
}
USAGE = {
    "prompt_tokens": 128,
    "completion_tokens": 1,
    "total_tokens": 129,
    "prompt_tokens_details": {"cached_tokens": 112, "host_cached_tokens": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--events", type=int, default=200, help="of a stream")
    parser.add_argument("--requests", type=int, default=256, help="streamed; ten times as many of one token")
    parser.add_argument("--step-ms", type=float, default=10.0)
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(
        target=serve, args=(there, args.events, args.step_ms / 1000), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        streamed = runner.run(measured(Options(url=url, stream=True), args.streams, args.requests))
        whole = runner.run(measured(Options(url=url, stream=False), args.streams, 10 * args.requests))
    server.terminate()
    events = args.requests * (args.events + 2)
    us_an_event = 1e6 * (streamed["cpu_s"] - args.requests * whole["cpu_s"] / whole["requests"]) / events
    print(
        json.dumps(
            {
                "streams": args.streams,
                "us_an_event": round(us_an_event, 1),
                "events_per_s_seen": round(events / streamed["seconds"]),
                "client_busy_streaming": round(streamed["cpu_s"] / streamed["seconds"], 3),
                "us_a_request": round(1e6 * whole["cpu_s"] / whole["requests"], 1),
                "requests_per_s_seen": round(whole["requests"] / whole["seconds"]),
            }
        )
    )


async def measured(options: Options, at_once: int, requests: int) -> dict[str, float]:
    route = endpoint(options, "demo")
    body = route.body([Prompt(list(range(100, 228)), 64)])
    async with Client(options) as client:
        load = Load(client.sender(route, streams=options.streams).send, lambda index: body)
        await load.warm_up(at_once, at_once)
        before = time.process_time()
        await load.closed(at_once, requests)
        cpu_s = time.process_time() - before
    assert load.failed == 0, load.records[0]
    return {"cpu_s": cpu_s, "seconds": load.ended - load.started, "requests": requests}


def serve(pipe, events: int, step_s: float) -> None:
    asyncio.run(_serve(pipe, events, step_s))


async def _serve(pipe, events: int, step_s: float) -> None:
    streams: dict[asyncio.Transport, int] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Answer(streams), "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    event = chunk(b"data: " + json.dumps(EVENT).encode() + b"\n\n")
    usage = chunk(b"data: " + json.dumps(EVENT | {"choices": [], "usage": USAGE}).encode() + b"\n\n")
    end = usage + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    while True:
        await asyncio.sleep(step_s)
        for transport, sent in list(streams.items()):
            if sent < events:
                transport.write(event)
                streams[transport] = sent + 1
            else:
                transport.write(end)
                del streams[transport]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Answer(asyncio.Protocol):
    """Just enough HTTP for our own client: a request is over at the length that its head states."""

    def __init__(self, streams: dict) -> None:
        self._streams, self._got = streams, b""
        body = json.dumps(EVENT | {"choices": [{"text": " w", "finish_reason": "length"}], "usage": USAGE})
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._whole = (head + body).encode()
        self._head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    def connection_made(self, transport) -> None:
        self._transport = transport

    def connection_lost(self, error) -> None:
        self._streams.pop(self._transport, None)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]):
            return
        self._got = b""
        if b'"stream":true' in body:
            self._transport.write(self._head)
            self._streams[self._transport] = 0
        else:
            self._transport.write(self._whole)


if __name__ == "__main__":
    main()
