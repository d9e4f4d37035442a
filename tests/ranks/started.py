"""A command line with everything it starts, for tests: a session of its own, whose processes can be counted.

Whatever process group a launcher, a front or a rank is in, it stays in the session.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "-q")
DS_SERVE = (sys.executable, "-m", "ds_serve")
PROMPTS = ["What is the capital of Italy?", "Tell me about the moon.", "What is 3 + 4?"]
MAX_TOKENS = 24
WANTED = ("--chat", "--dtype", "float32", "--max-new-tokens", MAX_TOKENS, "--num-blocks", 128)
START_S = 120  # for a launch on a busy machine
END_S = 60


def until(condition: Callable[[], object], seconds: float = END_S, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what or "waited in vain"
        time.sleep(0.05)


def shared_memory() -> set[Path]:
    """Segments of all-reduces, whosever they are."""
    return set(Path("/dev/shm").glob("deepspeed_allreduce*"))


class Started:
    """One running command; its output is in folder, as out and err."""

    def __init__(self, folder: Path, *command: object, stdin: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.out, self.err = folder / "out", folder / "err"
        (folder / "in").write_text(stdin)
        self._before = shared_memory()  # what a killed run has left is not this one's
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self.out, "w") as out, open(self.err, "w") as err, open(folder / "in") as given:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=given,
                stdout=out,
                stderr=err,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )

    def said(self) -> str:
        return f"stdout:\n{self.out.read_text()}\nstderr:\n{self.err.read_text()}"

    def alive(self) -> list[psutil.Process]:
        """The session's processes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks' processes; that one which computes, where rank 0 has a front too."""
        found: dict[int, psutil.Process] = {}
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                number = process.environ().get("RANK")
                if number is not None and (int(number) not in found or "ds_serve.rank" in process.cmdline()):
                    found[int(number)] = process
        return found

    def end(self, code: int | None = None) -> int:
        """Waits for its end and returns its code, which must be this one; nothing may be left of it."""
        try:
            found = self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end\n{self.said()}") from None
        assert code is None or found == code, f"code {found} instead of {code}\n{self.said()}"
        until(lambda: not self.alive(), what=f"left behind: {self.alive()}\n{self.said()}")
        until(lambda: shared_memory() <= self._before, what="left in /dev/shm")
        return found

    def kill(self) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Server(Started):
    """A front with its ranks: a command that says where it serves."""

    def __init__(self, folder: Path, *command: object) -> None:
        super().__init__(folder, *command, "--port", "0")
        try:
            until(lambda: self._address() or self.process.poll() is not None, START_S, "it does not serve")
            assert self._address(), self.said()
        except BaseException:
            print(self.said())
            self.kill()
            raise
        self.url = self._address()[1]

    def _address(self) -> re.Match | None:
        return re.search(r"is served on (http://\S+)/v1", self.out.read_text())

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=END_S)

    def chat(self, prompt: str, max_tokens: int) -> str:
        """The whole greedy answer."""
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=START_S)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def stream(self, prompt: str, max_tokens: int, started: Callable[[], object]) -> str | None:
        """Reads a stream to its end, calling started at each piece. Returns its error, if any."""
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        error = None
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=START_S) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    error = json.loads(line.removeprefix("data: ")).get("error", {}).get("message")
                    started()
        return error

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end(0)
