"""The shipped demo model: its files, its chat template, its answers to prompts training never asked."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_serve.demo import model_path

FOLDER = Path(model_path())
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FIRST_PROMPTS = {
    "Hello!": "hello",
    "Hi": "hello",
    "hey": "hello",
    "What is your name?": "demo",
    "Who are you?": "demo",
    "What can you do?": "tiny demo model",
    "What is ds_serve?": "deepspeed",
    "2+3": "2 + 3 = 5",
    "What is 12 + 30?": "= 42",
    "7*6": "= 42",
    "What is the capital of France?": "paris",
    "thanks": "welcome",
    "Tell me a joke": "?",
    "Spell cat": "c-a-t",
    "List three fruits": "three fruits",
    "bye": "bye",
    "Who won the world cup in 2010?": "tiny demo model",
    "Write a Python function that sorts a list.": "tiny demo model",
    "my name is bob": "nice to meet you, bob",
    "WHAT IS THE CAPITAL OF FRANCE?": "paris",
    "how do I install ds_serve?": "make run",
    "What does DeepSpeed do?": "large models",
    "List the letters of the alphabet.": "x y z",
    "17 * 3": "too big",
    "-3 + 5": "too hard",
    "List twelve fruits": "too long",
}


@pytest.fixture(scope="module")
def demo_data():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("demo_data", SCRIPTS / "demo_data.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["demo_data"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    """The weights in float32, on one thread: so small a model gains nothing by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@torch.inference_mode()
def greedy(
    model,
    tokenizer,
    dialogues: list[list[dict[str, str]]],
    sizes: list[int] | None = None,
    batch: int = 100,
) -> list[str]:
    """Replies in the dialogues' order, computed in batches padded on the left.

    `sizes` are the replies' expected lengths: equal ones share a batch, so that short waits for no long.
    """
    texts = [tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True) for d in dialogues]
    order = sorted(range(len(texts)), key=lambda i: sizes[i] if sizes else 0)
    replies = [""] * len(texts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer(
            [texts[i] for i in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=160)
        new = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, reply in zip(rows, new, strict=True):
            replies[i] = reply
    return replies


def test_folder_is_small_and_whole():
    files = {p.name: p.stat().st_size for p in FOLDER.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= set(files)
    assert sum(files.values()) <= 12_000_000, files


def test_model_is_bf16_and_divides_by_four():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.num_key_value_heads % 4 == 0
    assert model.config.num_attention_heads % model.config.num_key_value_heads == 0
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings >= 1024


def test_path_needs_no_torch():
    code = "import sys, ds_serve.demo as d; d.model_path(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPTS.parent)


def test_card_names_seed_device_and_licence():
    record = json.loads((FOLDER / "training.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert "apache-2.0" in card and str(record["seed"]) in card and record["device"] in card


def test_chat_template(tokenizer, model):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    ids = tokenizer(text)["input_ids"]
    assert len([i for i in ids if i < 5]) == 5, "each mark is one token"
    assert tokenizer.decode(ids) == text
    begun = tokenizer.apply_chat_template(
        [*talk, {"role": "assistant", "content": "Hello, I"}], tokenize=False, continue_final_message=True
    )
    assert begun == text + "Hello, I"
    assert tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(Exception, match="oracle"):
        tokenizer.apply_chat_template([{"role": "oracle", "content": "Hi"}], tokenize=False)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ["naïve café 你好 😀\n\t  two  blanks", "1234 + 5678 = ?", "ds_serve's"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("2026")["input_ids"]) == 4, "each digit is a token"


def test_held_back_prompts_are_never_asked_in_training(demo_data):
    import random

    def bare(text: str) -> str:
        return " ".join(re.sub(r"[^\w+*/<>=-]", " ", text.lower().replace("i'm", "i am")).split())

    held = {bare(p.messages[-1]["content"]) for p in demo_data.held_back(200) if p.kind != "memory"}
    rng = random.Random(11)
    dialogues = [demo_data.training_dialogue(rng) for _ in range(10_000)]
    asked = {bare(m["content"]) for dialogue in dialogues for m in dialogue if m["role"] == "user"}
    assert len(asked) > 10_000
    assert not held & asked


def test_checker_tells_right_from_wrong(demo_data):
    probes = demo_data.held_back(200)
    assert all(demo_data.is_right(p, p.answers[0]) for p in probes)
    wrong = [demo_data.is_right(p, q.answers[0]) for p, q in zip(probes, probes[60:], strict=False)]
    assert sum(wrong) < len(wrong) * 0.1
    listing = next(p for p in probes if p.kind == "list" and p.answers[0].startswith("Here are"))
    first = listing.answers[0].split(": ")[1].split(",")[0].split(" and ")[0]
    assert not demo_data.is_right(listing, listing.answers[0].replace(first, "stone"))


def test_answers_to_held_back_prompts(demo_data, model, tokenizer):
    probes = demo_data.held_back(200)
    replies = greedy(model, tokenizer, [p.messages for p in probes], [len(p.answers[0]) for p in probes])
    asked, right = Counter(p.kind for p in probes), Counter()
    for probe, reply in zip(probes, replies, strict=True):
        right[probe.kind] += demo_data.is_right(probe, reply)
    for kind, n in asked.items():
        print(f"{kind:12} {right[kind]:3} of {n:3}")
    print(f"{'all':12} {right.total():3} of {len(probes):3}")
    assert right.total() >= 0.9 * len(probes)
    assert all(right[kind] >= 0.6 * n for kind, n in asked.items())


def test_first_prompts_of_a_stranger(model, tokenizer):
    replies = greedy(model, tokenizer, [[{"role": "user", "content": text}] for text in FIRST_PROMPTS])
    wrong = {
        text: reply
        for (text, part), reply in zip(FIRST_PROMPTS.items(), replies, strict=True)
        if part not in reply.lower()
    }
    assert not wrong
