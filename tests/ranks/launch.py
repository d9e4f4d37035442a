"""Runs a script on several ranks that DeepSpeed's launcher started, and leaves no process behind.

On CPU it starts ranks once, which import everything and then fork (nursery.py): the imports take longer than
most scripts. A script finds what the launcher set, in processes of its own. On CUDA each script is a launch.
"""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[2]
MOST = 4  # ranks
START_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(script: Path, ranks: int, *args: str, timeout: float = 240) -> list[str]:
    """Lines that all ranks of `script args` printed; AssertionError with the output if it fails or hangs."""
    if torch.cuda.is_available():
        return _run_launch(script, ranks, *args, timeout=timeout)
    return _nursery().run([str(script), *args], ranks, timeout)


def _launch(ranks: int, script: Path, *args: str, **more) -> subprocess.Popen:
    # The launcher's part for one machine: what `deepspeed` itself starts, after as long an import again.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "-q", "--no_local_rank",
        "--master_port", str(free_port()), str(script), *args,
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "tests" / "model"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    return subprocess.Popen(command, env=env, stderr=subprocess.STDOUT, start_new_session=True, **more)


def _run_launch(script: Path, ranks: int, *args: str, timeout: float) -> list[str]:
    process = _launch(ranks, script, *args, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, f"{script.name} ended with {process.returncode}:\n{output}"
        return output.splitlines()
    except subprocess.TimeoutExpired:
        end_group(process)
        raise AssertionError(f"{script.name} ran past {timeout} s:\n{process.communicate()[0]}") from None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Ends the launcher and its ranks: the ones that are in its process group, whatever became of it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@functools.cache
def _nursery() -> Nursery:
    """Started at its first use; it ends with this process, however that ends."""
    return Nursery()


class Nursery:
    """MOST ranks of one launch, each of which forks a process for each script."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._output = Path(self._folder.name, "nursery")
        with self._output.open("w") as output:
            self._process = _launch(
                MOST,
                Path(__file__).with_name("nursery.py"),
                self._folder.name,
                stdin=subprocess.PIPE,
                stdout=output,
            )
        atexit.register(end_group, self._process)

    def run(self, arguments: list[str], ranks: int, timeout: float) -> list[str]:
        """As run_ranks."""
        output = Path(self._folder.name, "output")
        output.write_text("")
        environment = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
        order = {"arguments": arguments, "environment": environment, "output": str(output)}
        with ExitStack() as stack, selectors.DefaultSelector() as waiting:
            pids = {}
            for rank in range(ranks):
                link = stack.enter_context(self._call(rank))
                answers = stack.enter_context(link.makefile("rwb", buffering=0))  # what is read was selected
                answers.write(json.dumps(order).encode() + b"\n")
                pids[rank] = int(answers.readline() or self._lost())
                waiting.register(link, selectors.EVENT_READ, (rank, answers))
            failed, deadline = "", time.monotonic() + timeout
            while waiting.get_map():
                if not (events := waiting.select(max(0.0, deadline - time.monotonic()))):
                    failed, deadline = f"ran past {timeout} s", float("inf")
                for key, _ in events:
                    rank, answers = key.data
                    waiting.unregister(key.fileobj)
                    if code := int(answers.readline() or self._lost()):
                        failed = failed or f"ended with {code} on rank {rank}"
                    pids.pop(rank)
                if failed:
                    for pid in pids.values():
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        said = output.read_text()
        assert not failed, f"{Path(arguments[0]).name} {failed}:\n{said}"
        return said.splitlines()

    def _call(self, rank: int) -> socket.socket:
        deadline = time.monotonic() + START_S
        while True:
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect(f"{self._folder.name}/{rank}")
                return link
            except OSError:
                link.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._lost()
                time.sleep(0.05)

    def _lost(self) -> NoReturn:
        raise AssertionError(f"the nursery is lost:\n{self._output.read_text()}")
