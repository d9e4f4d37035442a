"""`ds-serve serve`: HTTP and the engine's supervisor in one event loop, until a signal or failure.

Knows processes, ports and signals; the routes are app.py's. Called by cli.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from ds_serve import launch
from ds_serve.config import Settings
from ds_serve.messages import EngineInfo
from ds_serve.server.app import create_app
from ds_serve.server.front import Front
from ds_serve.server.supervisor import RestartPolicy, Supervisor
from ds_serve.text.codec import TextCodec
from ds_serve.text.defaults import GenerationDefaults

_OPEN_REQUESTS_GRACE_S = 5  # how long answers may still take when the server is told to stop


def serve(
    settings: Settings,
    start: Callable[[Sequence[str]], launch.Launch] = launch.one,
    policy: RestartPolicy | None = None,
) -> int:
    """Serves settings.model until SIGINT or SIGTERM. start and policy are the Supervisor's.

    Returns the process's exit code: 0 after a signal, 1 where the port, the model or the engine
    failed. HTTP answers 503 while the engine loads.
    """
    try:
        front_socket = _listen(settings.host, settings.port)
        defaults = GenerationDefaults.load(settings.model)
    except (OSError, ValueError) as error:
        return _failed(error)
    supervisor = Supervisor(settings.model_dump_json(), start=start, ranks=settings.world_size, policy=policy)
    return asyncio.run(_serve(settings, supervisor, front_socket, defaults))


async def _serve(
    settings: Settings, supervisor: Supervisor, front_socket: socket.socket, defaults: GenerationDefaults
) -> int:
    front = Front(settings.name, defaults, supervisor, created=int(time.time()))
    config = uvicorn.Config(
        create_app(front),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_OPEN_REQUESTS_GRACE_S,
    )
    server = _Server(config)
    await supervisor.start()
    watch = asyncio.create_task(_watch(settings, front, supervisor, server, front_socket))
    try:
        await server.serve(sockets=[front_socket])
    finally:
        watch.cancel()
        await supervisor.stop()
    try:
        return await watch
    except asyncio.CancelledError:
        # A launcher that sees a rank fail ends this process too: that is a failure still.
        return 0 if supervisor.failure is None else _failed(_for_good(supervisor.failure))


async def _watch(
    settings: Settings,
    front: Front,
    supervisor: Supervisor,
    server: uvicorn.Server,
    front_socket: socket.socket,
) -> int:
    """Says where the server is once it can answer; ends it where tokenizer or engine fail for good."""
    try:
        # Beside the engine's own loading, and off the loop, which answers /health meanwhile.
        front.codec = await asyncio.to_thread(
            TextCodec, settings.model, trust_remote_code=settings.trust_remote_code
        )
        info = await supervisor.wait_ready()
        print(_greeting(settings.name, info, front_socket), flush=True)
        await supervisor.given_up.wait()
        return _failed(_for_good(supervisor.reason))
    except Exception as error:  # transformers raises what it likes over a tokenizer's files
        return _failed(error)
    finally:
        server.should_exit = True


def _for_good(reason: str) -> str:
    return f"the engine failed for good: {reason}"


def _failed(reason: object) -> int:
    print(f"ds-serve: {reason}", file=sys.stderr, flush=True)
    return 1


class _Server(uvicorn.Server):
    """uvicorn's server, which ends by returning: the engine is still to be stopped after it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError naming host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    # Connections inherit it. asyncio sets it only where the socket names its protocol, which this does not.
    # Without it a body, sent after its headers, waits for the client's delayed acknowledgement of them, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _greeting(name: str, info: EngineInfo, front_socket: socket.socket) -> str:
    host, port = front_socket.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    ranks = ""
    if info.tensor_parallel * info.pipeline_parallel > 1:
        ranks = f", tensor parallel {info.tensor_parallel} x pipeline parallel {info.pipeline_parallel}"
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"{name} ({info.dtype} on {info.device}{ranks}, {info.max_model_len} tokens, "
        f"{info.num_blocks} KV blocks of {info.block_size}) is served on {url}/v1\n"
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
