"""The command `ds-serve check`: a certificate of what ranks loaded, and greedy tokens of the whole engine.

The certificate is worker/certify.py's, made at load. Here the engine continues prompts, in chunks and in one
batch, and the original (model/original.py), a layer at a time, says of each token whether it is its best one
too. Called by cli.py, on rank 0.
"""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.config import Settings
from ds_serve.engine.local import LocalEngine
from ds_serve.messages import Request, SamplingParams
from ds_serve.model.certificate import Certificate, Greedy
from ds_serve.model.original import Original
from ds_serve.rank import build_checked_engine

MATCH, MISMATCH, REFUSED, UNFINISHED = 0, 1, 2, 3  # exit codes
# On another rank, as RankFailure's cause.
REFUSALS = ("ModelLoadError", "UnsupportedModelError", "ValueError")

PROMPT_LENGTHS = (1, 7, 16, 17, 31, 48, 64, 90)
NEW_TOKENS = 16
CHUNK = 48  # tokens in a step at most, so that prompts come in chunks, beside others' tokens


def run(settings: Settings, json_file: str | None) -> int:
    """Prints the certificate or why there is none, writes it to json_file, and returns the exit code."""
    settings = settings.model_copy(
        update={"max_num_batched_tokens": min(settings.max_num_batched_tokens, CHUNK)}
    )
    try:
        certificate = check(settings)
    except Exception as error:
        if isinstance(error, ValueError) or str(getattr(error, "cause", "")).startswith(REFUSALS):
            print(f"ds-serve: {error}", file=sys.stderr)
            return REFUSED
        print(f"ds-serve: the check did not end: {type(error).__name__}: {error}", file=sys.stderr)
        return UNFINISHED
    if json_file is not None:
        Path(json_file).write_bytes(certificate.to_json())
    print(certificate.table())
    return MATCH if certificate.matches else MISMATCH


def check(settings: Settings) -> Certificate:
    """The certificate, with greedy tokens unless layers differ. Raises what loading raises, RankFailure."""
    engine, certificate = build_checked_engine(settings)
    if not certificate.matches:
        engine.close()
        return certificate
    try:
        prompts = _prompts(engine.info.vocab_size, engine.info.max_model_len)
        outputs = _continue(engine, prompts)
    finally:
        engine.close()
    certificate.greedy = _compare(settings, prompts, outputs, certificate.logits)
    return certificate


def _prompts(vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Random token ids, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    longest = max(1, max_model_len - NEW_TOKENS)
    return [
        torch.randint(0, vocab_size, (min(length, longest),), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


def _continue(engine: LocalEngine, prompts: list[list[int]]) -> list[list[int]]:
    """The engine's greedy continuations, all prompts at once. RuntimeError where a request fails."""
    count = min(NEW_TOKENS, engine.info.max_model_len - max(map(len, prompts)))
    arrived = [queue.SimpleQueue() for _ in prompts]
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=count, temperature=0.0)
        request = Request(id=f"check-{index}", prompt_token_ids=prompt, params=params)
        engine.submit(request, arrived[index].put)
    return [_tokens(each) for each in arrived]


def _tokens(arrived: queue.SimpleQueue) -> list[int]:
    tokens: list[int] = []
    while True:
        output = arrived.get()
        tokens += output.token_ids
        if output.finish_reason == "error":
            raise RuntimeError(output.error)
        if output.finish_reason is not None:
            return tokens


@torch.inference_mode()
def _compare(
    settings: Settings, prompts: list[list[int]], outputs: list[list[int]], difference: float
) -> Greedy:
    """outputs beside the original's best token after the same tokens before.

    difference is the largest of a logit in the certificate: two logits may come closer by twice as much.
    """
    sequences = [torch.tensor(prompt + output) for prompt, output in zip(prompts, outputs, strict=True)]
    logits = _logits(settings, [ids[:-1] for ids in sequences])
    greedy = Greedy(prompts=len(prompts), tokens=sum(map(len, outputs)))
    start = 0
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        first = start + len(prompt) - 1
        start += len(prompt) + len(output) - 1
        for place, (row, token) in enumerate(zip(logits[first:start], output, strict=True)):
            best = int(row.argmax())
            gap = (row[best] - row[token]).item()
            if gap == 0:
                continue
            if gap <= 2 * difference:
                greedy.ties += 1
            else:
                greedy.mismatches.append(
                    f"prompt {index} of {len(prompt)} tokens, new token {place}: {token} instead of {best}, "
                    f"whose logit is larger by {gap:.2g}, where logits differ by {difference:.2g} at most"
                )
    return greedy


def _logits(settings: Settings, sequences: list[torch.Tensor]) -> torch.Tensor:
    """The original's in float32, of all tokens one after another: [T, V]."""
    device = torch.device(get_accelerator().current_device_name())
    original = Original(settings, torch.float32, device)
    given = {}
    for part in original.parts(range(len(original.kinds))):
        seen = part.run(sequences, given)
        last = part.layers[-1]
        given = {last + 1: seen.outputs[last]}
    return seen.logits
