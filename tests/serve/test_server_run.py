"""serve() in a process of its own, with a fake engine: ready line, signals, exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(fake_engine.__file__).parents[2]

# argv: fake_engine.py, model folder, port, the fake's settings, which settings.json holds in place of ours.
PROGRAM = """
import logging, os, sys
from ds_serve.config import Settings
from ds_serve.launch import Launch
from ds_serve.server import run
from ds_serve.server.supervisor import RestartPolicy
fake, model, port, fake_settings = sys.argv[1:]
logging.basicConfig(level="INFO")
class FakeSettings(Settings):
    def model_dump_json(self):
        return fake_settings
settings = FakeSettings(model=model, served_model_name="tiny", port=int(port))
start = lambda arguments: Launch([sys.executable, fake, *arguments], dict(os.environ))
sys.exit(run.serve(settings, start, RestartPolicy(max_restarts=0)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    vocab = {
        piece: i for i, piece in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    (path / "config.json").write_text('{"eos_token_id": 1}')
    return path


@pytest.fixture
def start(model, tmp_path):
    processes = []

    def run(port=0, **settings):
        settings |= {"journal": str(tmp_path / "journal")}
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM,
                fake_engine.__file__,
                str(model),
                str(port),
                json.dumps(settings),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_ready(process):
    line = process.stdout.readline()
    return re.search(r"tiny .*64 tokens.* is served on (http://\S+)/v1", line)[1]


def engine_pids(tmp_path):
    return [int(line) for line in (tmp_path / "journal").read_text().split()]


def assert_nothing_left(tmp_path):
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in engine_pids(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(tmp_path.glob("ds-serve-*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(start, tmp_path, number):
    process = start(children=1)
    url = wait_ready(process)
    assert process.stdout.readline().startswith(f"try: curl {url}/v1/chat/completions")
    answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "hi"}, timeout=20)
    assert answer.json()["usage"]["completion_tokens"] == 4
    process.send_signal(number)
    assert process.wait(15) == 0
    assert_nothing_left(tmp_path)


def test_health_is_503_while_the_engine_loads(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(port=port, load_s=600)
    while not (tmp_path / "journal").exists():
        time.sleep(0.02)
    response = httpx.get(f"http://127.0.0.1:{port}/health", timeout=20)
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    assert "starting" in response.json()["error"]["message"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    assert_nothing_left(tmp_path)


def test_an_engine_given_up_ends_it_with_an_error(start, tmp_path):
    process = start(life_s=0.3, reason="lost its device")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "lost its device" in errors
    assert_nothing_left(tmp_path)


def test_a_port_in_use_is_told(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(port=taken.getsockname()[1])
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "cannot listen on 127.0.0.1" in errors


def test_a_model_without_tokenizer_ends_it_with_an_error(start, model, tmp_path):
    tokenizer = model / "tokenizer.json"
    hidden = tokenizer.rename(model / "hidden")
    try:
        process = start()
        _, errors = process.communicate(timeout=60)
    finally:
        hidden.rename(tokenizer)
    assert process.returncode == 1 and "ds-serve: " in errors
    assert_nothing_left(tmp_path)
