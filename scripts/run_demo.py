"""The demo model's server and the chat page together, until Ctrl-C or until one of them ends: `make run`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType

COMMAND = (sys.executable, "-m", "ds_serve")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", default="8000", help="of the server; default: %(default)s")
    parser.add_argument("--chat-port", default="7860", help="default: %(default)s")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.suppress(KeyboardInterrupt), started(args.port, args.chat_port) as ended:
        return ended()
    return 0


@contextlib.contextmanager
def started(port: str, chat_port: str, *flags: str) -> Iterator:
    """Starts the server, with these flags, and the page on it; ends both.

    Gives a function that waits for one of them to end, and returns its code.
    """
    children: list[subprocess.Popen] = []
    try:
        server = subprocess.Popen(
            # The Engine tab asks for /metrics every second: no line for each of these.
            [*COMMAND, "serve", "demo", "--port", port, "--no-access-log", *flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(server)
        url = _url(server)
        if url is not None:
            threading.Thread(target=shutil.copyfileobj, args=(server.stdout, sys.stdout), daemon=True).start()
            children.append(subprocess.Popen([*COMMAND, "chat", "--base-url", url, "--port", chat_port]))
        yield lambda: os.waitstatus_to_exitcode(os.wait()[1])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C has reached the children too: they end
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def _url(server: subprocess.Popen) -> str | None:
    """The base URL that the server says, or None where it ends before."""
    for line in server.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"is served on (\S+)$", line):
            return found[1]
    return None


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
