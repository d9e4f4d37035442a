"""The processes of the chat page's tests: the demo model's server, and the page."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import httpx
from started import DS_SERVE, START_S, Started, until

SPIED = Path(__file__).parent / "spied.py"


class Model:
    """`ds-serve serve demo` on one port; it can be killed and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._folder, self._port = folder, port
        self._process: Started | None = None
        self._starts = 0

    def launch(self) -> None:
        self._starts += 1
        flags = ("--port", self._port, "--num-blocks", 512, "--host-cache", "8MiB")
        self._process = Started(self._folder / str(self._starts), *DS_SERVE, "serve", "demo", *flags)

    def wait_ready(self) -> None:
        said = self._process.out.read_text
        until(lambda: "is served on" in said() or self._process.process.poll() is not None, START_S)
        assert "is served on" in said(), self._process.said()

    def kill(self) -> None:
        self._process.kill()

    def stats(self) -> dict:
        return httpx.get(f"{self.url}/health", timeout=START_S).json()["stats"]

    def wait_idle(self) -> None:
        until(lambda: self.stats()["num_running"] == 0)


class Chat(Started):
    """`ds-serve chat` under an audit hook that writes down what it connects to; url is the page's."""

    def __init__(self, folder: Path, server: str, *flags: object) -> None:
        folder.mkdir(exist_ok=True)
        self.connections = folder / "connections"
        self.connections.write_text("")
        command = (sys.executable, SPIED, self.connections, "chat", "--base-url", f"{server}/v1", "--port", 0)
        super().__init__(folder, *command, *flags)
        until(lambda: self._address() or self.process.poll() is not None, START_S)
        assert self._address(), self.said()
        self.url = self._address()[1]

    def _address(self) -> re.Match | None:
        return re.search(r"the chat page is on (http://\S+),", self.out.read_text())

    def finish(self) -> None:
        """Ends it by SIGTERM; asserts that it ends well and has looked for no other machine."""
        self.process.send_signal(signal.SIGTERM)
        self.end(0)
        elsewhere = [line for line in self.connections.read_text().splitlines() if "127.0.0.1" not in line]
        assert not elsewhere
        assert "Traceback" not in self.said(), self.said()
