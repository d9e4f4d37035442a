"""`ds-serve chat`: the page over HTTP, until a signal.

Knows the process: environment, port, login and limits; page.py is what it serves. Called by cli.py and
apps/chat.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from typing import Any

from ds_serve.chat import arguments

# Before gradio is imported: it asks at its import and start whether it may call home.
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_LAST_ANSWERS_S = 1  # how long open streams have to end, at the end


def main(argv: list[str] | None = None) -> int:
    """apps/chat.py: run() with the flags of a command line of its own."""
    parser = argparse.ArgumentParser(prog="chat.py", description=arguments.DESCRIPTION)
    arguments.add_arguments(parser)
    try:
        return run(vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def run(args: dict[str, Any]) -> int:
    """Serves the page until SIGINT or SIGTERM. Returns the exit code: 0, or 1 where it cannot start.

    Raises ValueError where an argument says nothing sensible.
    """
    logins = arguments.logins(args)
    system = arguments.text(args["system_prompt"] or "", "--system-prompt")
    os.environ.update(_QUIET)
    try:
        import uvicorn

        from ds_serve.chat.client import Server
        from ds_serve.chat.page import Limits, create_app
    except ModuleNotFoundError as error:
        return _failed(f"{error.name} is not installed: pip install 'ds_serve[chat]'")
    host, port = args["host"], args["port"]
    try:
        listening = _listen(host, port)
    except OSError as error:
        return _failed(f"cannot listen on {host}:{port}: {error}")
    port = listening.getsockname()[1]
    server = Server(args["base_url"], os.environ.pop("OPENAI_API_KEY", None), args["model"])
    limits = Limits(args["max_answers"], args["max_queue"])
    app = create_app(server, host=host, port=port, limits=limits, logins=logins, system=system.strip())
    print(f"the chat page is on {_url(host, port)}, its server is {server.base_url}", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_LAST_ANSWERS_S
    )
    asyncio.run(_serve(uvicorn.Server(config), listening))
    return 0


async def _serve(web: Any, listening: socket.socket) -> None:
    """Until a signal; a second one does not wait for answers."""

    def stop() -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of pages that are cut off
        web.handle_exit(signal.SIGINT, None)

    web.capture_signals = contextlib.nullcontext  # it would raise them again at its end
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await web.serve(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _failed(reason: str) -> int:
    print(f"ds-serve chat: {reason}", file=sys.stderr)
    return 1
