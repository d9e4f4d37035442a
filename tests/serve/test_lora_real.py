"""Two adapters of the demo model on a real server, as OpenAI's client sees them, against peft's generate."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from real_server import CHAT, Server, text_of
from transformers import AutoModelForCausalLM

from ds_serve import cli, demo
from ds_serve.text.codec import TextCodec

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_adapters import NAMES, adapt
from tiny_models import oracle

ADAPTERS = {
    "fr": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "de": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
}
FREE = {"extra_body": {"ignore_eos": True}}
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """(folders of the adapters, the text that each model continues CHAT by)."""
    codec, folders, texts = TextCodec(demo.model_path()), {}, {}
    ids = codec.encode_chat(CHAT)
    for name in ("demo", *NAMES):
        model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        if name in ADAPTERS:
            folders[name] = tmp_path_factory.mktemp(name)
            model = adapt(model, folders[name], NAMES.index(name), ADAPTERS[name])
        texts[name] = codec.decode(oracle(model, ids, NUM_TOKENS))
    assert len(set(texts.values())) == 3
    return folders, texts


@pytest.fixture(scope="module")
def server(wanted, tmp_path_factory):
    flag = ",".join(f"{name}={folder}" for name, folder in wanted[0].items())
    started = Server(tmp_path_factory.mktemp("log") / "log", "--adapters", flag)
    yield started
    started.stop()


def ask(server, model, **body):
    return server.chat(model=model, max_tokens=NUM_TOKENS, **(FREE | body))


def test_each_name_has_its_own_answer_in_one_batch(server, wanted):
    texts = wanted[1]
    names = list(texts) * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: ask(server, name), names))
    assert [answer.choices[0].message.content for answer in answers] == [texts[name] for name in names]
    assert [answer.model for answer in answers] == names


def test_all_that_a_request_can_ask_for_works_through_an_adapter(server, wanted):
    text = wanted[1]["de"]
    assert text_of(ask(server, "de", stream=True)) == text
    answer = ask(server, "de", n=3, logprobs=True, top_logprobs=2).choices
    assert [choice.message.content for choice in answer] == [text] * 3
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in answer[0].logprobs.content)
    response = server.openai.responses.create(
        model="de", input=CHAT, temperature=0, max_output_tokens=NUM_TOKENS, **FREE
    )
    assert (response.model, response.output_text) == ("de", text)
    guided = server.chat(model="de", extra_body={"guided_regex": "[0-9]{6}"})
    assert guided.choices[0].message.content.isdigit() and len(guided.choices[0].message.content) == 6


def test_a_prefix_is_cached_for_its_own_name_only(server):
    messages = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog. " * 8}]
    cached = [
        ask(server, name, messages=messages).usage.prompt_tokens_details.cached_tokens
        for name in ("fr", "de", "demo", "fr", "de", "demo")
    ]
    assert cached[:3] == [0] * 3 and cached[3] > 16 and cached[3:] == [cached[3]] * 3


def test_models_are_listed_and_others_refused(server):
    assert [(card.id, card.parent) for card in server.openai.models.list()] == [
        ("demo", None), ("fr", "demo"), ("de", "demo"),
    ]  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="'it' is not served here; 'demo', 'fr', 'de' are"):
        ask(server, "it")


def test_generate_takes_an_adapter(wanted, capsys):
    """The command line, and so the pipeline under it."""
    folders, texts = wanted
    flag = ",".join(f"{name}={folder}" for name, folder in folders.items())
    command = ["generate", "demo", "--dtype", "float32", "--num-blocks", "64", "--adapters", flag, "--chat"]
    command += ["--prompt", CHAT[0]["content"], "--max-new-tokens", str(NUM_TOKENS)]
    assert cli.main([*command, "--adapter", "de"]) == 0
    found = capsys.readouterr().out.strip()
    assert found and texts["de"].startswith(found)
    assert cli.main([*command, "--adapter", "it"]) == 2
    assert "adapter: 'it' is not loaded; loaded: fr, de" in capsys.readouterr().err
