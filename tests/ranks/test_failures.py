"""Ranks that die, hang or raise, under the front's supervisor and under the deepspeed launcher itself.

Waits are bounded, generously: how long it takes depends on the machine.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import psutil
import pytest
from launch import free_port
from started import DEEPSPEED, DS_SERVE, END_S, START_S, Server, Started, until

STREAMS = 16
FAR = 1900  # tokens: no stream gets so far before its rank fails
MODEL = ("demo", "--num-blocks", 2048)


@contextmanager
def streaming(server):
    """The errors of STREAMS streams, there after the block, which begins once all are under way."""
    begun, errors = [Event() for _ in range(STREAMS)], []
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [
            threads.submit(server.stream, f"Number {index}", FAR, event.set)
            for index, event in enumerate(begun)
        ]
        try:
            for event in begun:
                assert event.wait(END_S), "a stream does not begin"
            yield errors
            errors += [stream.result(END_S) for stream in streams]
        except BaseException:
            server.kill()  # or the threads never end
            raise


# Each start of four ranks takes a while: `make test` has two, `make test-all` four, and loses each of them.
GRID, LOSSES = ("--pp", 2), [(1, signal.SIGKILL)]
if os.environ.get("DS_SERVE_TEST_ALL"):
    GRID = ("--tp", 2, "--pp", 2)
    LOSSES = [(n, signal.SIGKILL) for n in (3, 0, 1, 2)] + [(1, signal.SIGSTOP)]


@pytest.mark.timeout(900)
def test_the_service_comes_back_from_the_loss_of_a_rank_and_ends_with_its_front(tmp_path):
    with Server(tmp_path / "s", *DS_SERVE, "serve", *MODEL, *GRID) as server:
        answer = server.chat("What is the capital of France?", 16)
        for rank, number in LOSSES:
            with streaming(server) as errors:
                server.ranks()[rank].send_signal(number)
            assert all(error and f"rank {rank} " in error for error in errors), errors
            health = server.health()
            assert health.status_code == 503 and int(health.headers["retry-after"]) > 0
            assert f"rank {rank} " in health.text
            until(lambda: server.health().status_code == 200, START_S, "it does not come back")
            assert server.chat("What is the capital of France?", 16) == answer
        with ThreadPoolExecutor(1) as thread:
            begun, folder = Event(), Path(server.ranks()[0].cmdline()[-2])
            assert (folder / "settings.json").exists()
            stream = thread.submit(server.stream, "Once", FAR, begun.set)
            assert begun.wait(END_S)
            server.process.kill()
            assert stream.exception(END_S) is not None
        server.end(-signal.SIGKILL)
        assert not folder.exists()


BROKEN = """
import os, sys
from ds_serve.cli import main
from ds_serve.worker.worker import Worker

launch = Worker.launch

def broken_launch(self, plan):
    if plan.step > 20 and os.environ.get("RANK") == "1":
        raise FloatingPointError("broken on purpose")
    return launch(self, plan)

Worker.launch = broken_launch
sys.exit(main())
"""


def test_a_rank_that_raises_ends_a_launch_with_its_words(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    launcher = (*DEEPSPEED, "--num_accelerators", 2, "--master_port", free_port())
    with Server(tmp_path / "s", *launcher, script, "serve", *MODEL, "--tp", 2) as server:
        error = server.stream("Once", FAR, lambda: None)
        assert "rank 1 (stage 0, tensor 1)" in error and "broken on purpose" in error
        assert server.end() != 0
        assert "ds-serve: the engine failed for good: " in server.err.read_text()
        assert "FloatingPointError: broken on purpose" in server.err.read_text()


SCRIPT = f"""
import ds_serve
from ds_serve.demo import model_path

pipe = ds_serve.pipeline(model=model_path(), pipeline_parallel=2, num_blocks=512)
for delta in pipe("Once", max_new_tokens={FAR}, min_new_tokens={FAR}, stream=True):
    print(delta, flush=True)
"""


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_script_ends_with_its_lost_rank(tmp_path, rank, number):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = (*DEEPSPEED, "--num_accelerators", 2, "--master_port", free_port())
    with Started(tmp_path / "s", *launcher, script) as ranks:
        until(lambda: ranks.out.read_text().count("\n") > 3 or ranks.process.poll() is not None, START_S)
        assert ranks.process.poll() is None, ranks.said()
        lost = ranks.ranks()[rank]
        lost.send_signal(number)
        assert ranks.end() != 0
        assert f"rank {rank}" in ranks.err.read_text()
        assert not psutil.pid_exists(lost.pid)
