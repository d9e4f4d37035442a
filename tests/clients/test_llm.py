"""The command line `llm`, told of the server by a file as its manual says."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from asked import ANSWER, KEY, City
from click.testing import CliRunner


@pytest.fixture(scope="module")
def folder(base_url, tmp_path_factory):
    """llm's own folder, with the demo model in it."""
    folder = tmp_path_factory.mktemp("llm")
    model = {
        "model_id": "served",
        "model_name": "demo",
        "api_base": base_url,
        "api_key_name": "of-the-tests",
        "supports_schema": True,
        "supports_tools": True,
    }
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump([model]))
    (folder / "keys.json").write_text(json.dumps({"of-the-tests": KEY}))
    return folder


@pytest.fixture
def llm(folder, monkeypatch):
    """llm's answer to its arguments, in this process: an import less."""
    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    from llm.cli import cli

    return lambda *arguments: CliRunner().invoke(cli, [*arguments, "--no-log"])


PROMPT = ("-m", "served", "-o", "temperature", "0", "-o", "max_tokens", "60", "What is the capital of Italy?")


def test_a_prompt_at_the_shell(folder):
    command = [sys.executable, "-m", "llm", *PROMPT]
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    answer = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert answer.returncode == 0 and ANSWER in answer.stdout, answer.stderr


def test_streamed_and_whole_answers_are_one(llm):
    whole, streamed = llm(*PROMPT, "--no-stream"), llm(*PROMPT)
    assert ANSWER in whole.output and whole.output == streamed.output


def test_a_schema(llm):
    answer = llm(*PROMPT, "--schema", json.dumps(City.model_json_schema()))
    City.model_validate_json(answer.output)


def test_an_error_is_told(llm):
    answer = llm(*PROMPT[:-1], "-o", "top_p", "7", "hello")
    assert answer.exit_code == 1 and "top_p" in answer.output
