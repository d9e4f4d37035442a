"""The command line as a stranger types it, on the demo model."""

from __future__ import annotations

import subprocess
import sys

import pytest


def ds_serve(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ds_serve", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=180)


def test_generate_answers_a_chat_and_says_nothing_else():
    done = ds_serve("generate", "demo", "--chat", "--prompt", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_launcher_flags_are_the_launchers_under_a_launcher(monkeypatch):
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "x",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    done = ds_serve("--local_rank=0", "serve", "demo", "--tp", "2", "--master-port", "7777")
    assert done.returncode == 2 and "has started this process already" in done.stderr


def test_generate_keeps_the_order_of_stdin():
    prompts = ["What is 2 + 3?", "What is the capital of Italy?", "What is 4 + 4?"]
    done = ds_serve("generate", "demo", "--chat", stdin="\n".join(prompts))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "5" in lines[0] and "Rome" in lines[1] and "8" in lines[2]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "demo", "--prompt", "a", "--num-blocks", "none"], "num_blocks"),
        (["generate", "demo", "--prompt", "a", "--top-p", "1.5"], "top_p"),
        (["generate", "demo", "--prompt", "a", "--max-new-tokens", "1000000"], "1000000"),
        (["generate", "/nowhere", "--prompt", "a"], "/nowhere"),
        (["serve", "/nowhere"], "/nowhere"),
        (["serve"], "model"),
        (["serve", "demo", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["generate", "demo"], "prompt"),
        (["serve", "demo", "--master_port", "7777"], "--master_port: for several ranks"),
        (["serve", "demo", "--tp", "2", "--hostfile", "/nowhere"], "/nowhere"),
        (["generate", "demo", "--prompt", "a", "--tp", "2", "--no-ssh"], "--hostfile, --node_rank"),
        (["generate", "demo", "--prompt", "a", "--pp", "2", "--stage-layers", "1,2,1"], "stage_layers"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, word):
    done = ds_serve(*arguments)
    assert done.returncode not in (0, -9)
    assert word in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
