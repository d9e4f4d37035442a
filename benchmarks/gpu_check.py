"""Whether the engine is right on this device, before anything is timed: a 2-layer model of the same shape.

In float32 with plain attention, the tokens are those of transformers' generate. In bfloat16 with everything
fast, log-probabilities of prompts and answers are as near to transformers' float32 as transformers' own
bfloat16 is, within a factor; and the tokens are those of the engine's plain path wherever float32 leaves no
doubt which token is the best. Used by gpu.py; several ranks run this file, as gpu_run.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_model import DRY, FULL, Scale
from gpu_run import Answer, Bench, settings_of
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ds_serve.launch import ranks
from ds_serve.rank import follow

TIE = 1e-4  # of the logits' standard deviation: nearer than this two float32 sums may come out either way
RMS_FACTOR, MAX_FACTOR = 1.5, 4.0  # of the errors that transformers' own bfloat16 has
DOUBT = 3.0  # times the largest error seen: two tokens that float32 has nearer may swap
PLAIN = {"attention": "reference", "injection": "off", "compile": "off", "graphs": "off"}
ALTERNATIVES = 2


class CheckFailed(Exception):
    """The engine is not right here; the message says where."""


class Original:
    """transformers' model on this device, asked for log-probabilities of given tokens."""

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        self._model, self._device = model.to(device).eval(), device
        self.vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def greedy(self, prompt: list[int], out: int) -> list[int]:
        ids = torch.tensor([prompt], device=self._device)
        found = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=out, do_sample=False, pad_token_id=0
        )
        return found[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), vocabulary]."""
        ids = torch.tensor([tokens], device=self._device)
        return self._model(input_ids=ids, use_cache=False).logits[0].float()

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens) - 1]: of each token but the first."""
        following = torch.tensor(tokens[1:], device=self._device)[:, None]
        return self.logits(tokens[:-1]).log_softmax(-1).gather(1, following)[:, 0]


def check(job: dict) -> list[str]:
    """Lines that say what was compared and found. Raises CheckFailed."""
    torch.set_float32_matmul_precision("highest")
    logging.disable_progress_bar()
    scale = DRY if job["dry"] else FULL
    device = torch.device("cpu" if job["dry"] else "cuda")
    exact = Original(job["folder"], device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(10, exact.vocab_size, (length,), generator=generator).tolist()
        for length in scale.check_prompts
    ]
    with _engine(job, scale, prompts, dtype="float32", **PLAIN) as bench:
        plain = bench.run(prompts, scale.check_out)
    lines = [_tokens_of_float32(exact, prompts, plain)]
    with _engine(job, scale, prompts, dtype="bfloat16") as bench:
        in_use = bench.in_use
        fast = bench.run(prompts, scale.check_out)
        told = bench.run(prompts, scale.check_out, logprobs=ALTERNATIVES)
        scored = bench.run(prompts, 1, prompt_logprobs=0)  # this takes no prefix from the cache
    half = Original(job["folder"], device, torch.bfloat16)
    line, doubt = _distance(exact, half, prompts, told, scored)
    with _engine(job, scale, prompts, dtype="bfloat16", **PLAIN) as bench:
        plain = bench.run(prompts, scale.check_out)
    return [*lines, f"fast path: {in_use}", line, _same_where_clear(exact, prompts, fast, plain, doubt)]


def verdict(job: dict) -> dict:
    """check() as plain values: its lines, or the failure."""
    try:
        return {"lines": check(job)}
    except CheckFailed as failure:
        return {"failure": str(failure)}


@contextlib.contextmanager
def _engine(job: dict, scale: Scale, prompts: list[list[int]], **chosen) -> Iterator[Bench]:
    lengths = [len(prompt) + scale.check_out for prompt in prompts]
    own = {
        "max_num_batched_tokens": scale.check_chunk,
        "max_model_len": max(lengths),
        "num_blocks": sum(lengths) // 8 + 64,
        "kv_cache_memory": None,
    }
    settings = settings_of(job | {"parts": [], "settings": job["settings"] | chosen}, scale, **own)
    bench = Bench(settings, scale)
    try:
        yield bench
    finally:
        bench.engine.close()


def _tokens_of_float32(exact: Original, prompts: list[list[int]], answers: list[Answer]) -> str:
    ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = exact.greedy(prompt, len(answer.tokens))
        if (at := _first_difference(answer.tokens, wanted)) is None:
            continue
        logits = exact.logits(prompt + wanted[:at])[-1]
        gap = (logits[wanted[at]] - logits[answer.tokens[at]]).item() / logits.std().item()
        if abs(gap) > TIE:
            raise CheckFailed(
                f"float32, plain path: after a prompt of {len(prompt)} tokens and {at} more the engine drew "
                f"{answer.tokens[at]}, transformers {wanted[at]}, by {gap:.2g} standard deviations"
            )
        ties += 1
    return (
        f"float32, plain path: {len(prompts)} answers of {len(answers[0].tokens)} tokens are those of "
        "generate" + (f" ({ties} but for a tie)" if ties else "")
    )


def _distance(
    exact: Original,
    half: Original,
    prompts: list[list[int]],
    answers: list[Answer],
    scored: list[Answer],
) -> tuple[str, float]:
    """(what was found, the largest error in a log-probability that was seen)."""
    ours, theirs = [], []
    for prompt, answer, scores in zip(prompts, answers, scored, strict=True):
        tokens = prompt + answer.tokens
        right, near = (model.logprobs(tokens) for model in (exact, half))
        said = scores.prompt_logprobs + answer.logprobs
        if len(said) != len(tokens) - 1:
            raise CheckFailed(f"{len(said)} log-probabilities came for {len(tokens) - 1} tokens")
        ours.append(torch.tensor(said, device=right.device) - right)
        theirs.append(near - right)
    (rms, most), (rms_half, most_half) = (_errors(torch.cat(each)) for each in (ours, theirs))
    allowed, allowed_rms = MAX_FACTOR * most_half, RMS_FACTOR * rms_half
    found = (
        f"bfloat16, fast path: log-probabilities of {sum(map(len, ours))} tokens are off float32 by "
        f"{rms:.4f} (root mean square) and at most {most:.4f}; transformers' own bfloat16 by "
        f"{rms_half:.4f} and {most_half:.4f}; allowed {allowed_rms:.4f} and {allowed:.4f}"
    )
    if not (rms <= allowed_rms and most <= allowed):  # NaN fails
        raise CheckFailed(found)
    return found, max(most, most_half)


def _errors(each: torch.Tensor) -> tuple[float, float]:
    return each.square().mean().sqrt().item(), each.abs().max().item()


def _same_where_clear(
    exact: Original, prompts: list[list[int]], fast: list[Answer], plain: list[Answer], doubt: float
) -> str:
    """The first difference of two answers must be between tokens that float32 holds nearly equal."""
    same, doubts = 0, 0
    for prompt, one, other in zip(prompts, fast, plain, strict=True):
        at = _first_difference(one.tokens, other.tokens)
        same += len(one.tokens) if at is None else at
        if at is None:
            continue
        logits = exact.logits(prompt + one.tokens[:at])[-1]
        gap = abs(logits[one.tokens[at]] - logits[other.tokens[at]]).item()
        if not gap <= DOUBT * doubt:
            raise CheckFailed(
                f"bfloat16: after a prompt of {len(prompt)} tokens and {at} more the fast path drew "
                f"{one.tokens[at]}, the plain path {other.tokens[at]}; float32 has them {gap:.3f} apart, and "
                f"{DOUBT * doubt:.3f} would be in doubt"
            )
        doubts += 1
    total = sum(len(each.tokens) for each in fast)
    if same < math.ceil(total / 4):
        raise CheckFailed(f"bfloat16: fast and plain path agree in {same} of {total} tokens only")
    return (
        f"bfloat16: fast path and plain path draw the same {same} tokens of {total}, up to {doubts} answers' "
        f"first token that float32 leaves in doubt (less than {DOUBT * doubt:.3f} apart)"
    )


def _first_difference(one: list[int], other: list[int]) -> int | None:
    pairs = zip(one, other, strict=True)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), None)


def main() -> int:
    if (env := ranks()) is not None and env.rank > 0:
        return follow()
    Path(sys.argv[2]).write_text(json.dumps(verdict(json.loads(Path(sys.argv[1]).read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
