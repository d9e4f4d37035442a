"""`ds-serve serve`: HTTP and the engine's supervisor in one event loop, until a signal or failure.

Knows processes, ports and TLS; the routes are app.py's, signals stop.py's. Called by cli.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import resource
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from ds_serve import launch
from ds_serve.config import SECRETS, Settings
from ds_serve.messages import EngineInfo
from ds_serve.server.accesslog import RequestLog, log_to_stderr
from ds_serve.server.app import create_app, package_version
from ds_serve.server.connection import MAX_HEAD_BYTES, Connection
from ds_serve.server.front import Front
from ds_serve.server.keys import KeyRing
from ds_serve.server.observe import start_tracing
from ds_serve.server.stop import Stop
from ds_serve.server.supervisor import RestartPolicy, Supervisor
from ds_serve.text.codec import TextCodec
from ds_serve.text.defaults import GenerationDefaults

if TYPE_CHECKING:
    from ds_serve.server.tracing import Tracing

log = logging.getLogger(__name__)

_LAST_BYTES_GRACE_S = 5  # how long clients may take what is left of answers, once all have ended
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, which then never meet a closed one
_MAX_OPEN_FILES = 65_536


def serve(
    settings: Settings,
    start: Callable[[Sequence[str]], launch.Launch] = launch.one,
    policy: RestartPolicy | None = None,
) -> int:
    """Serves settings.model until SIGINT or SIGTERM. start and policy are the Supervisor's.

    Returns the process's exit code: 0 after a signal, 128 + its number after a second one, 1 where the port,
    the keys, the model or the engine failed. HTTP answers 503 while the engine loads.
    """
    try:
        keys = KeyRing.load(settings)
        check_tls(settings)
        tracing = start_tracing(settings.name, package_version())
        front_socket = _listen(settings.host, settings.port)
        defaults = GenerationDefaults.load(settings.model)
    except (OSError, ValueError) as error:
        return _failed(error)
    forget_secrets()
    _allow_connections()
    log_to_stderr(access=settings.access_log, prompts=settings.log_prompts)
    log.info("settings: %s", _describe(settings, keys))
    supervisor = Supervisor(settings.model_dump_json(), start=start, ranks=settings.world_size, policy=policy)
    return uvloop.run(_serve(settings, keys, supervisor, front_socket, defaults, tracing))


async def _serve(
    settings: Settings,
    keys: KeyRing,
    supervisor: Supervisor,
    front_socket: socket.socket,
    defaults: GenerationDefaults,
    tracing: Tracing | None,
) -> int:
    front = Front(
        settings.name,
        defaults,
        supervisor,
        created=int(time.time()),
        adapters=tuple(settings.adapters),
        tool_format=settings.tool_format,
        tracing=tracing,
    )
    server = uvicorn.Server(uvicorn_config(RequestLog(create_app(front, settings, keys)), settings))
    server.capture_signals = contextlib.nullcontext  # they are Stop's
    stop = Stop(front.door, supervisor, server, settings.drain_timeout)
    with stop.on_signals():
        await supervisor.start()
        watch = asyncio.create_task(_watch(settings, front, supervisor, server, front_socket))
        try:
            await server.serve(sockets=[front_socket])
        finally:
            watch.cancel()
            await supervisor.stop()
            if tracing is not None and not stop.exit_code:
                await asyncio.to_thread(tracing.close)
    try:
        code = await watch
    except asyncio.CancelledError:
        # A launcher that sees a rank fail ends this process too: that is a failure still.
        code = 0 if supervisor.failure is None else _failed(_for_good(supervisor.failure))
    return code or stop.exit_code


def uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves app under these settings."""
    password = settings.ssl_keyfile_password
    return uvicorn.Config(
        app,
        http=functools.partial(
            Connection,
            arrival_timeout_s=settings.body_timeout,
            stall_timeout_s=settings.stream_stall_timeout,
        ),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_BYTES_GRACE_S,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile_password=None if password is None else password.get_secret_value(),
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )


def check_tls(settings: Settings) -> None:
    """Raises ValueError where certificate, key and password do not fit; OpenSSL would ask at the terminal."""
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    password = settings.ssl_keyfile_password
    secret = "" if password is None else password.get_secret_value()
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=lambda: secret)
        if settings.ssl_ca_certs is not None:
            context.load_verify_locations(settings.ssl_ca_certs)
    except OSError as error:
        names = ", ".join(
            f"{name} {value}"
            for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
            if (value := getattr(settings, name)) is not None
        )
        raise ValueError(f"{names}, DS_SERVE_SSL_KEYFILE_PASSWORD: {error}") from None


def forget_secrets() -> None:
    """What is started from here on, the model's own code among it, does not inherit them."""
    names = {f"DS_SERVE_{name.upper()}" for name in SECRETS}
    for name in [name for name in os.environ if name.upper() in names]:
        del os.environ[name]


def _allow_connections() -> None:
    """A connection is a file: as many as this process may ask for, up to a bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _describe(settings: Settings, keys: KeyRing) -> str:
    """What differs from the defaults, and what follows from them, as JSON without secrets."""
    derived = {
        "name": settings.name,
        "ranks": settings.world_size,
        "accepted_api_keys": len(keys),
        "max_open_requests": settings.open_requests_limit,
    }
    return msgspec.json.encode(settings.model_dump(mode="json", exclude_defaults=True) | derived).decode()


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
        # What is imported by now is never garbage; looking through it now and then would stall all answers.
        gc.freeze()
        info = await supervisor.wait_ready()
        print(_greeting(settings, info, front_socket), flush=True)
        await supervisor.given_up.wait()
        return 0 if supervisor.is_stopping else _failed(_for_good(supervisor.reason))
    except Exception as error:  # transformers raises what it likes over a tokenizer's files
        return _failed(error)
    finally:
        server.should_exit = True


def _for_good(reason: str) -> str:
    return f"the engine failed for good: {reason}"


def _failed(reason: object) -> int:
    print(f"ds-serve: {reason}", file=sys.stderr, flush=True)
    return 1


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError naming host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    # Connections inherit it. asyncio sets it only where the socket names its protocol, which this does not.
    # Without it a body, sent after its headers, waits for the client's late acknowledgement of them, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _greeting(settings: Settings, info: EngineInfo, front_socket: socket.socket) -> str:
    host, port = front_socket.getsockname()[:2]
    scheme = "http" if settings.ssl_certfile is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    ranks = ""
    if info.tensor_parallel * info.pipeline_parallel > 1:
        ranks = f", tensor parallel {info.tensor_parallel} x pipeline parallel {info.pipeline_parallel}"
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys or settings.api_key_file else ""
    body = f'{{"model": "{settings.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"{settings.name} ({info.dtype} on {info.device}{ranks}, {info.max_model_len} tokens, "
        f"{info.num_blocks} KV blocks of {info.block_size}) is served on {url}/v1\n"
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
