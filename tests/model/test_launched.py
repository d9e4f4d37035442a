"""Steps that run ahead of the host: the same tokens, log-probabilities and grammars as one step at a time."""

from __future__ import annotations

import queue

import pytest
import torch
from late_device import NONSENSE, late_device
from tiny_models import VOCAB, build, mixed_prompts, oracles, run_all, save

from ds_serve import demo
from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine
from ds_serve.text.codec import TextCodec
from ds_serve.text.grammar import Grammars
from ds_serve.worker import launched

LENGTHS = [4 + (7 * index) % 17 for index in range(32)]
TIGHT = {"num_blocks": 32, "block_size": 4, "max_num_batched_tokens": 64}
PRESSURES = {
    "preemption and hits": TIGHT,
    "host cache": TIGHT | {"num_blocks": 24, "host_cache": 2**20},
    "three steps ahead": TIGHT | {"num_blocks": 200, "steps_in_flight": 4},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = build("llama")
    prompts = mixed_prompts(32)
    return save(model, tmp_path_factory.mktemp("llama")), prompts, oracles(model, prompts, LENGTHS)


@pytest.mark.parametrize("pressure", list(PRESSURES))
def test_tokens_are_those_of_generate(pressure, llama, engine_of):
    folder, prompts, wanted = llama
    with late_device() as device:
        engine = engine_of(model=folder, **PRESSURES[pressure])
        assert run_all(engine, prompts, LENGTHS) == wanted
        assert run_all(engine, prompts, LENGTHS) == wanted
        assert device.most_ahead == (4 if "ahead" in pressure else 2)
    assert engine.stats().cached_tokens > 0


def answers(engine, prompts, params: list[SamplingParams]) -> list:
    """(tokens, their log-probabilities, the prompt's) of each request."""
    queues = []
    for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        queues.append(queue.SimpleQueue())
        engine.submit(Request(id=str(index), prompt_token_ids=prompt, params=each), queues[-1].put)
    return [_answer(each) for each in queues]


def _answer(outputs: queue.SimpleQueue) -> tuple:
    tokens, logprobs, of_prompt = [], [], None
    while True:
        output = outputs.get(timeout=60)
        assert output.finish_reason != "error", output.error
        tokens += output.token_ids
        logprobs += output.logprobs or []
        of_prompt = output.prompt_logprobs or of_prompt
        if output.finish_reason:
            return tokens, logprobs, of_prompt


def values(answer: tuple) -> list[float]:
    """All log-probabilities of an answer, of its tokens and of its prompt's."""
    entries = [*answer[1], *(answer[2] or [])]
    return [value for entry in entries for value in (entry.logprob, *entry.top_logprobs)]


def test_draws_penalties_and_logprobs_are_those_of_one_step_at_a_time(llama, engine_of):
    folder, prompts, _ = llama
    kinds = [
        {"temperature": 1.0, "top_p": 0.8, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "logprobs": 0},
        {"temperature": 0.7, "top_k": 20, "presence_penalty": 0.7, "prompt_logprobs": 2},
        {"temperature": 0.0, "logit_bias": {5: 20.0}, "min_tokens": 4, "eos_token_ids": (5,)},
    ]
    params = [SamplingParams(max_tokens=n, seed=n, **kinds[n % 4]) for n in LENGTHS]
    wanted = answers(engine_of(model=folder, steps_in_flight=1, **TIGHT), prompts, params)
    with late_device():
        found = answers(engine_of(model=folder, **TIGHT), prompts, params)
    for one, other in zip(found, wanted, strict=True):
        assert one[0] == other[0]
        assert values(one) == pytest.approx(values(other), abs=1e-4)  # steps are cut otherwise
    assert any(len(tokens) < length for (tokens, *_), length in zip(wanted, LENGTHS, strict=True))


def test_grammars_hear_of_every_token_in_its_order(engine_of):
    """In fewer slots than requests, so that slots change hands while steps are under way."""
    codec = TextCodec(demo.model_path())
    grammars = Grammars(codec.tokenizer)
    wanted = [grammars.regex("[a-f]{9}-[0-9]{5}"), "", grammars.json_schema({"type": "integer"}), ""]
    prompts = [codec.encode_chat([{"role": "user", "content": f"What is {n}?"}]) for n in range(16)]
    params = [
        SamplingParams(
            max_tokens=24, temperature=n % 3 / 2, seed=n, eos_token_ids=(1,), grammar=wanted[n % 4]
        )
        for n in range(16)
    ]
    settings = {"model": demo.model_path(), "dtype": "float32", "num_blocks": 40, "max_num_seqs": 5}
    alone = answers(engine_of(steps_in_flight=1, **settings), prompts, params)
    with late_device():
        assert answers(engine_of(**settings), prompts, params) == alone
    assert len({tuple(tokens) for tokens, *_ in alone}) > 8


def test_a_step_that_fails_late_ends_its_requests_with_the_reason(llama, monkeypatch):
    folder, prompts, _ = llama

    def finish(self):
        raise RuntimeError("an illegal memory access, say")

    with late_device():
        engine = build_local_engine(Settings(model=folder))
        monkeypatch.setattr(launched.Launched, "finish", finish)
        outputs = queue.SimpleQueue()
        params = SamplingParams(max_tokens=5)
        engine.submit(Request(id="a", prompt_token_ids=prompts[0], params=params), outputs.put)
        last = outputs.get(timeout=20)
        engine.close()
    assert last.finish_reason == "error" and "an illegal memory access, say" in last.error


def test_the_stand_in_hides_what_is_not_there_yet():
    with late_device(step_s=0.2) as device:
        host = device.started(torch.tensor([5]))
        clock = device.timer(torch.device("cpu"))
        clock.begin()
        clock.end()
        assert host.item() == NONSENSE and not clock.is_over()
        clock.wait()
        assert host.item() == 5 < VOCAB
