"""What the layers before a route cost a request, without sockets: request id and access log, and the gate.

    python benchmarks/gate.py

A POST of 200 bytes with eight headers goes through each stack of layers into an application that answers at
once; microseconds a request, the best of several rounds. The access log is written to /dev/null.
"""

import argparse
import asyncio
import logging
import os
import time

from ds_serve.config import Settings
from ds_serve.server.accesslog import RequestLog, access_log, log_to_stderr
from ds_serve.server.gate import Door, Gate
from ds_serve.server.keys import KeyRing

BODY = b'{"prompt": "' + b"x" * 186 + b'"}'
HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"accept", b"application/json"),
    (b"content-type", b"application/json"),
    (b"user-agent", b"OpenAI/Python"),
    (b"authorization", b"Bearer sk-0123456789abcdef0123456789abcdef"),
    (b"content-length", str(len(BODY)).encode()),
]


async def answer(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


async def receive():
    return {"type": "http.request", "body": BODY, "more_body": False}


async def send(message):
    pass


async def microseconds(app, count):
    began = time.perf_counter()
    for _ in range(count):
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": HEADERS, "state": {}}
        await app(scope | {"client": ("127.0.0.1", 5)}, receive, send)
    return (time.perf_counter() - began) / count * 1e6


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    log_to_stderr(access=True, prompts=False)
    access_log.handlers[0].setStream(open(os.devnull, "w"))  # noqa: SIM115
    settings, keys = Settings(model="m"), KeyRing(["sk-0123456789abcdef0123456789abcdef", "sk-other"])
    gate = {
        name: Gate(answer, Door(), settings, ring) for name, ring in (("open", KeyRing()), ("keys", keys))
    }
    stacks = {
        "nothing": (answer, True),
        "gate": (gate["open"], True),
        "gate, two keys": (gate["keys"], True),
        "request id": (RequestLog(answer), False),
        "request id and access log": (RequestLog(answer), True),
        "all": (RequestLog(gate["keys"]), True),
    }
    for name, (app, logs) in stacks.items():
        access_log.setLevel(logging.INFO if logs else logging.CRITICAL)
        best = min([await microseconds(app, options.requests) for _ in range(options.rounds)])
        print(f"{name:30}{best:8.1f} us")


if __name__ == "__main__":
    asyncio.run(main())
