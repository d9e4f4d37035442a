"""Where prompts come from: random ones, a file of them, or the lengths and shared prefixes of a trace.

Knows tokens, words and lengths, no HTTP. A source is asked by request number, and gives the same answer
for the same seed and number, in whatever order it is asked. Numbers below 0 are warm-up requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from ds_serve.bench.lengths import Lengths
from ds_serve.bench.tokens import key, keyed, to_ids, to_text
from ds_serve.bench.traces import TraceRow, decode_line, lines_of

_TAIL, _GROUP, _BLOCK, _LENGTH = range(4)  # what a key is of


@dataclass(frozen=True)
class Prompt:
    """content is a text, token ids, or a chat's messages; output_tokens how many to ask for."""

    content: str | list[int] | list[dict[str, Any]]
    output_tokens: int


class Source(Protocol):
    """Prompts by number. size is how many there are before they repeat; None: they never do."""

    size: int | None

    def prompt(self, index: int) -> Prompt: ...


@dataclass(frozen=True)
class Wording:
    """How numbers become a prompt: token ids below vocab_size, or words."""

    ids: bool
    vocab_size: int

    def __call__(self, numbers: np.ndarray) -> str | list[int]:
        return to_ids(numbers, self.vocab_size) if self.ids else to_text(numbers)


@dataclass(frozen=True)
class RandomPrompts:
    """Prompts of drawn lengths; the first shared_prefix tokens are those of one of `groups` groups.

    tail_seed varies what is not shared: a sweep's later steps find the shared prefixes cached, and no more.
    """

    wording: Wording
    input_tokens: Lengths
    output_tokens: Lengths
    seed: int
    tail_seed: int = 0
    shared_prefix: int = 0
    groups: int = 1
    size: None = None

    def prompt(self, index: int) -> Prompt:
        rng = np.random.default_rng([self.seed % 2**63, self.tail_seed, index % 2**63, _LENGTH])
        length = max(self.input_tokens.draw(rng), self.shared_prefix + 1 if self.shared_prefix else 1)
        parts = [keyed(key(self.seed, self.tail_seed, index, _TAIL), length - self.shared_prefix)]
        if self.shared_prefix:
            parts.insert(0, keyed(key(self.seed, index % self.groups, _GROUP), self.shared_prefix))
        return Prompt(self.wording(np.concatenate(parts)), self.output_tokens.draw(rng))


@dataclass(frozen=True)
class Repeated:
    """The first `distinct` prompts of a source, again and again; a warm-up that long sends them all."""

    source: Source
    distinct: int
    size: None = None

    def prompt(self, index: int) -> Prompt:
        return self.source.prompt(index % self.distinct)


@dataclass(frozen=True)
class TracePrompts:
    """The lengths of a trace; equal hash ids give equal blocks. Prompts past the trace's end begin again."""

    wording: Wording
    rows: list[TraceRow]
    seed: int
    tail_seed: int = 0

    @property
    def size(self) -> int:
        return len(self.rows)

    def prompt(self, index: int) -> Prompt:
        row = self.rows[index % len(self.rows)]
        numbers = keyed(key(self.seed, self.tail_seed, index, _TAIL), row.in_len)
        if index >= 0 and row.hash_ids:  # a warm-up must not fill the cache with what is measured next
            base = np.uint64(key(self.seed, self.tail_seed, _BLOCK))
            shared = keyed(np.asarray(row.hash_ids).astype(np.uint64) + base, row.block)[: row.in_len]
            numbers[: len(shared)] = shared
        return Prompt(self.wording(numbers), row.out_len)


class _FileRow(msgspec.Struct, forbid_unknown_fields=False):
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    output_tokens: int | None = None


class FilePrompts:
    """A file of JSON lines, each with prompt (text or token ids) or messages, and perhaps output_tokens.

    Where the endpoint takes a chat, a text becomes the user's message. Raises ValueError for a bad file.
    """

    def __init__(self, path: str, output_tokens: Lengths, seed: int, *, chat: bool) -> None:
        self._output_tokens, self._seed = output_tokens, seed
        self._rows = [
            _checked(decode_line(_FileRow, path, number, line), f"{path}, line {number}", chat)
            for number, line in lines_of(path, "--prompts")
        ]
        if not self._rows:
            raise ValueError(f"--prompts: {path} has no prompt")

    @property
    def size(self) -> int:
        return len(self._rows)

    def prompt(self, index: int) -> Prompt:
        row = self._rows[index % len(self._rows)]
        rng = np.random.default_rng([self._seed % 2**63, index % 2**63])
        return Prompt(row.prompt or row.messages, row.output_tokens or self._output_tokens.draw(rng))


def _checked(row: _FileRow, place: str, chat: bool) -> _FileRow:
    if bool(row.prompt) == bool(row.messages):
        raise ValueError(f"{place}: must have prompt or messages, and not both")
    if row.messages and not chat:
        raise ValueError(f"{place}: messages need --endpoint chat")
    if chat and isinstance(row.prompt, list):
        raise ValueError(f"{place}: token ids need --endpoint completions or batch")
    if row.output_tokens is not None and row.output_tokens < 1:
        raise ValueError(f"{place}: output_tokens must be at least 1")
    return row
