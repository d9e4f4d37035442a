"""A real server on the demo model: `python -m ds_serve serve` in a process of its own, and clients for it."""

import os
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import psutil

from ds_serve import demo

CHAT = [{"role": "user", "content": "Hello, who are you?"}]


class Server:
    """One server process and clients for it; its errors are in the file `log`."""

    def __init__(self, log, *flags, model=None):
        self.log = log
        command = [sys.executable, "-m", "ds_serve", "serve", str(model or demo.model_path()), "--port", "0"]
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [
                    *command,
                    "--num-blocks",
                    "256",
                    "--served-model-name",
                    "demo",
                    "--dtype",
                    "float32",
                    *flags,
                ],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
            )
        self.url = self._ready_url()
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def _ready_url(self):
        for line in self.process.stdout:
            found = re.search(r"is served on (http://\S+)/v1", line)
            if found:
                return found[1]
        raise AssertionError(self.log.read_text())

    def chat(self, **body):
        body = {"model": "demo", "messages": CHAT, "temperature": 0, "max_tokens": 24} | body
        return self.openai.chat.completions.create(**body)

    def stats(self):
        return httpx.get(self.url + "/health", timeout=10).json()["stats"]

    def engine(self):
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "ds_serve.rank" in child.cmdline())

    def stop(self):
        """Ends it by SIGTERM; asserts that it leaves nothing."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


def text_of(stream):
    chunks = [chunk for chunk in stream if chunk.choices]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
