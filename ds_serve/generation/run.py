"""One call of the pipeline: its requests to the engine, and what comes back, as records and deltas.

Knows requests, token ids and where a text stops; neither threads nor event loops, which are
pipeline.py's, the only caller.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_serve.generation.args import TENSORS, GenerateArgs
from ds_serve.generation.text import Input, Prompt, Texts
from ds_serve.messages import Output, Request
from ds_serve.text.detokenize import Detokenizer

_REQUEST_IDS = map(f"{uuid.uuid4().hex}-{{}}".format, itertools.count())


class GenerationError(RuntimeError):
    """The engine ended a request with an error; the message is its reason."""


Event = tuple[int, str, "list[dict[str, Any]] | None"]  # input's index, new text, its records when complete


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call's arguments, resolved and checked."""

    generate: GenerateArgs
    encode: Mapping[str, Any]
    returns: str
    skip_special_tokens: bool
    clean_up: bool | None
    stream: bool
    streamer: Any
    progress: bool | None
    max_inputs: int

    def check(self) -> None:
        for name, value in (("stream", self.stream), ("streamer", self.streamer)):
            if value and self.generate.num_sequences > 1:
                raise ValueError(f"{name}: follows one sequence, but num_return_sequences is more")
        if self.stream and (self.streamer or self.returns == TENSORS or self.clean_up):
            raise ValueError("stream: excludes streamer, return_tensors and clean_up_tokenization_spaces")
        if self.stream and self.generate.own.get("logprobs") is not None:
            raise ValueError("logprobs: are part of a record, and stream=True gives none")
        # The lengths wait for a prompt; any other bad value raises before any work.
        self.generate.sampling_params(0, 2**31)


class Sequence:
    """One request of the engine: what has come of it, and where its text stops."""

    def __init__(self, index: int, prompt: Prompt, call: Call, tokenizer: Any):
        generate = call.generate
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self.done = False
        self.stopped_text: str | None = None  # set where a string of `stop` ended it
        self._shown: list[str] = []
        self._text = self._ending = None
        if call.stream or generate.stop:
            self._text = Detokenizer(
                tokenizer,
                stop=generate.stop,
                skip_special_tokens=call.skip_special_tokens,
                min_tokens=generate.min_new_tokens,
            )
        if generate.stop_strings:  # these may be special tokens, which are no part of the text
            self._ending = Detokenizer(tokenizer, stop=generate.stop_strings, skip_special_tokens=False)
        self.prompt = prompt

    def take(self, output: Output) -> tuple[list[int], str]:
        """The new ids and new text that count: what follows a stop string does not."""
        if output.finish_reason in ("error", "abort"):
            self.done = True
            raise GenerationError(output.error or "the request was aborted")
        token_ids, final = output.token_ids, output.finish_reason is not None
        if self._ending is not None:
            before = self._ending.num_tokens
            self._ending.push(token_ids, final)
            if self._ending.stop_hit is not None:
                token_ids, final = token_ids[: self._ending.num_tokens - before], True
        delta = ""
        if self._text is not None:
            before = self._text.num_tokens
            delta = self._text.push(token_ids, final)
            self._shown.append(delta)
            if self._text.stop_hit is not None:
                token_ids, final = token_ids[: self._text.num_tokens - before], True
                self.stopped_text = "".join(self._shown)
        for token, logprob in zip(token_ids, output.logprobs or (), strict=False):
            record = {name: getattr(logprob, name) for name in ("logprob", "top_ids", "top_logprobs")}
            self.logprobs.append({"token_id": token, **record})
        self.token_ids += token_ids
        self.done = final
        return token_ids, delta


@dataclass
class Run:
    """The requests of one call: at most so many inputs in the engine at a time, aborted if left early."""

    engine: Any  # a LocalEngine
    texts: Texts
    call: Call
    inputs: Iterable[Input]
    emit: Callable[[Sequence, Output], None]  # called on the engine's thread
    groups: dict[int, list[Sequence]] = field(default_factory=dict)
    open: dict[Sequence, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = enumerate(self.inputs)

    def fill(self) -> bool:
        """Submits more inputs while there is room. False when everything has ended."""
        while len(self.groups) < self.call.max_inputs:
            item = next(self._waiting, None)
            if item is None:
                break
            self._submit(*item)
        return bool(self.groups)

    def _submit(self, index: int, value: Input) -> None:
        call, generate = self.call, self.call.generate
        prompt = self.texts.encode(value, call.encode, generate)
        limit = self.engine.info.max_model_len
        lengths = generate.lengths(len(prompt.token_ids), prompt.prefix_length, limit)
        params = [generate.sampling_params(*lengths, sample) for sample in range(generate.num_sequences)]
        if call.streamer is not None:
            call.streamer.put(_tensor([prompt.token_ids]))
        group = self.groups[index] = []
        for one in params:
            sequence = Sequence(index, prompt, call, self.texts.tokenizer)
            request = Request(
                id=next(_REQUEST_IDS),
                prompt_token_ids=prompt.token_ids,
                params=one,
                salt=generate.own.get("cache_salt") or "",
                priority=generate.own.get("priority") or 0,
                adapter=generate.own.get("adapter") or "",
            )
            group.append(sequence)
            self.open[sequence] = request.id
            self.engine.submit(request, lambda output, sequence=sequence: self.emit(sequence, output))

    def take(self, sequence: Sequence, output: Output) -> Event:
        """What an Output means for its input; outputs of a sequence that has ended mean nothing."""
        if sequence.done:
            return sequence.index, "", None
        with self.texts.lock:
            token_ids, delta = sequence.take(output)
        if self.call.streamer is not None:
            for token in token_ids:
                self.call.streamer.put(_tensor([token]))
        if not sequence.done:
            return sequence.index, delta, None
        request_id = self.open.pop(sequence)
        if output.finish_reason is None:
            self.engine.abort(request_id)
        group = self.groups[sequence.index]
        if not all(member.done for member in group):
            return sequence.index, delta, None
        del self.groups[sequence.index]
        if self.call.streamer is not None:
            self.call.streamer.end()
        return sequence.index, delta, self._results(group)

    def _results(self, group: list[Sequence]) -> list[dict[str, Any]]:
        """The records of an input's sequences, shorter ones padded as generate pads its batch."""
        call, texts = self.call, self.texts
        longest = max(len(sequence.token_ids) for sequence in group)
        pad = call.generate.pad_token_id
        records = []
        for sequence in group:
            padding = [] if pad is None else [pad] * (longest - len(sequence.token_ids))
            prompt, token_ids = sequence.prompt, sequence.token_ids + padding
            if call.returns == TENSORS:
                record = {"generated_token_ids": prompt.token_ids + token_ids}
            else:
                text = sequence.stopped_text
                if text is None:
                    text = texts.decode(prompt, token_ids, call.skip_special_tokens, call.clean_up)
                record = {"generated_text": texts.answer(prompt, text, call.returns, call.encode)}
            if call.generate.own.get("logprobs") is not None:
                record["logprobs"] = sequence.logprobs
            records.append(record)
        return records

    def abort(self) -> None:
        for request_id in self.open.values():
            self.engine.abort(request_id)
        self.open.clear()


def _tensor(values: list) -> Any:
    import torch  # what transformers' streamers expect

    return torch.tensor(values)
