"""The pipeline on a real engine, against transformers' own pipeline on the same tiny model."""

from __future__ import annotations

import asyncio
import re

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ds_serve

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "An increasing sequence: one, two, three, four, five.",
    "Ein größeres Beispiel mit Umlauten: äöüß, und ein Emoji 🙂.",
    "<|user|> What is it? <|assistant|> It is a test.",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}\n<|assistant|>{% endif %}"
)
BEFORE_5_23 = Version(transformers.__version__) < Version("5.23")
PROMPTS = ["The quick", "An increasing sequence: one", "", "Ein größeres 🙂", "x"]
CHAT = [{"role": "user", "content": "What is it?"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "It is"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(TEXTS * 4, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.pipeline("text-generation", model=str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ours(folder):
    with ds_serve.pipeline(
        "text-generation", model=folder, dtype=torch.float32, num_blocks=200, max_num_seqs=8, num_threads=1
    ) as pipe:
        yield pipe


GREEDY = {"do_sample": False, "max_new_tokens": 8}
RETURNS = {"text": {}, "new text": {"return_full_text": False}, "token ids": {"return_tensors": True}}
CALLS = {
    "special tokens": {**GREEDY, "skip_special_tokens": False, "add_special_tokens": False, "prefix": "The "},
    "clean up": {**GREEDY, "clean_up_tokenization_spaces": True},
    "penalty": {**GREEDY, "repetition_penalty": 1.7},
    "max_length": {"do_sample": False, "max_length": 24},
    "max_length and prefix": {"do_sample": False, "max_length": 20, "prefix": "An in"},
    "ends": {**GREEDY, "eos_token_id": [1, *range(100, 120)]},
    "minimum": {**GREEDY, "min_new_tokens": 6, "eos_token_id": list(range(100, 300))},
    "minimal length": {**GREEDY, "min_length": 9, "eos_token_id": list(range(100, 300))},
    "truncated": {**GREEDY, "truncation": True, "tokenizer_encode_kwargs": {"max_length": 3}},
    "hole": {"do_sample": False, "handle_long_generation": "hole", "max_new_tokens": 126},
    "config": {"generation_config": GenerationConfig(max_length=30, repetition_penalty=1.2, do_sample=False)},
    "neutral": {**GREEDY, "num_beams": 1, "use_cache": True, "temperature": None, "top_k": None},
}


@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("inputs", [PROMPTS, PROMPTS[0], CHAT, PREFILLED, [CHAT, PREFILLED]], ids=range(5))
def test_shapes_and_greedy_text_are_those_of_transformers(ours, theirs, name, inputs):
    arguments = {**GREEDY, **RETURNS[name]}
    assert ours(inputs, **arguments) == theirs(inputs, **arguments)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("inputs", [PROMPTS[:4], PREFILLED], ids=["texts", "chat"])
def test_arguments_mean_what_they_mean_to_transformers(ours, theirs, name, inputs):
    if BEFORE_5_23 and name.startswith("max_length"):
        pytest.skip("transformers' own pipeline (5.17) lets its default max_new_tokens override max_length")
    assert ours(inputs, **CALLS[name]) == theirs(inputs, **CALLS[name])


@pytest.mark.skipif(BEFORE_5_23, reason="transformers' own pipeline (5.17) fails with several stop strings")
def test_stop_strings_end_with_the_token_that_completes_one(ours, theirs):
    whole = ours(PROMPTS, return_full_text=False, **GREEDY)
    found = [re.findall(r"[a-z]{2}", record["generated_text"][1:-1]) for [record] in whole]
    stops = [pairs[-1] for pairs in found if pairs][:3]
    assert stops
    found = ours(PROMPTS, stop_sequence=stops, **GREEDY)
    assert found == theirs(PROMPTS, stop_sequence=stops, **GREEDY)
    assert found != ours(PROMPTS, **GREEDY)


def test_a_text_ends_before_a_string_of_stop(ours):
    [[whole]] = ours(["The quick"], return_full_text=False, **GREEDY)
    text = whole["generated_text"]
    stop = re.findall(r"[a-zA-Z]{2}", text)[-1]
    [record] = ours("The quick", return_full_text=False, stop=stop, **GREEDY)
    assert record["generated_text"] == text[: text.index(stop)]
    assert "".join(ours("The quick", stop=[stop], stream=True, **GREEDY)) == record["generated_text"]


def test_generators_are_lazy_and_batches_bounded(ours, theirs):
    taken = []

    def prompts():
        for prompt in PROMPTS:
            taken.append(prompt)
            yield prompt

    results = ours(prompts(), batch_size=2, **GREEDY)
    assert taken == []
    first = next(results)
    assert len(taken) < len(PROMPTS)
    assert [first, *results] == list(theirs(iter_of(PROMPTS), **GREEDY))


def iter_of(values):
    yield from values


def test_deltas_join_to_the_new_text(ours):
    wanted = [record["generated_text"] for [record] in ours(PROMPTS, return_full_text=False, **GREEDY)]
    found = [""] * len(PROMPTS)
    for index, delta in ours(PROMPTS, stream=True, **GREEDY):
        found[index] += delta
    assert found == wanted
    assert "".join(ours(PROMPTS[0], stream=True, **GREEDY)) == wanted[0]


def test_streamers_get_what_generate_gives_them(ours, theirs):
    class Record(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append((tuple(value.shape), value.tolist()))

        def end(self):
            self.seen.append("end")

    mine, other = Record(), Record()
    assert ours(PROMPTS[:2], streamer=mine, **GREEDY) == theirs(PROMPTS[:2], streamer=other, **GREEDY)
    assert mine.seen == other.seen


def test_asynchronous_calls_are_the_same(ours):
    async def both():
        deltas = [delta async for delta in ours.astream(PROMPTS[1], **GREEDY)]
        results = await asyncio.gather(
            ours.agenerate(PROMPTS, **GREEDY),
            ours.agenerate(CHAT, **GREEDY),
            ours.agenerate(iter_of(PROMPTS), **GREEDY),
        )
        return "".join(deltas), results

    text, (several, chat, lazy) = asyncio.run(both())
    assert several == lazy == ours(PROMPTS, **GREEDY)
    assert chat == ours(CHAT, **GREEDY)
    assert text == ours(PROMPTS[1], return_full_text=False, **GREEDY)[0]["generated_text"]


def test_sampling_is_repeatable_and_independent_of_its_company(ours):
    arguments = {"max_new_tokens": 10, "seed": 7, "num_return_sequences": 3, "temperature": 1.0}
    several = ours(PROMPTS, **arguments)
    assert several[1] == ours(PROMPTS[1], **arguments)
    assert len({record["generated_text"] for record in several[0]}) == 3
    transformers.set_seed(5)
    drawn = ours(PROMPTS[0], max_new_tokens=10)
    assert drawn != ours(PROMPTS[0], max_new_tokens=10)
    transformers.set_seed(5)
    assert drawn == ours(PROMPTS[0], max_new_tokens=10)


def test_logprobs_are_of_the_tokens(ours, folder):
    [record] = ours("The quick", logprobs=2, **GREEDY)
    [ids] = ours("The quick", return_tensors=True, **GREEDY)
    ids = ids["generated_token_ids"]
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    prompt = len(ids) - len(record["logprobs"])
    for offset, entry in enumerate(record["logprobs"]):
        row = wanted[prompt + offset - 1]
        assert entry["token_id"] == ids[prompt + offset]
        assert entry["logprob"] == pytest.approx(row[entry["token_id"]].item(), abs=1e-3)
        assert entry["top_logprobs"] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


def test_a_stream_left_early_frees_the_engine(ours):
    stream = ours(PROMPTS, stream=True, max_new_tokens=100, do_sample=False)
    next(stream)
    stream.close()
    ours("x", **GREEDY)
    stats = ours.engine.stats()
    assert stats.num_running == stats.num_waiting == 0


def test_a_closed_pipeline_says_so(folder):
    pipe = ds_serve.pipeline(model=folder, num_blocks=20, max_num_seqs=2, dtype="float32", max_new_tokens=3)
    assert len(pipe("x", return_tensors=True, seed=1)[0]["generated_token_ids"]) <= 5
    pipe.close()
    pipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipe("x")
