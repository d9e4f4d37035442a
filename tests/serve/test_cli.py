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
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, word):
    done = ds_serve(*arguments)
    assert done.returncode not in (0, -9)
    assert word in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
