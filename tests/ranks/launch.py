"""Runs a script on several ranks under DeepSpeed's launcher, and leaves no process behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(script: Path, ranks: int, *args: str, timeout: float = 240) -> list[str]:
    """Lines that all ranks of `script args` printed; AssertionError with the output if it fails or hangs."""
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
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
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
