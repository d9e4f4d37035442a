"""Token ids to text, as they come, with stop strings.

One Detokenizer a request. Knows nothing of why a request ends other than by a stop string. The
server and the pipeline push each Output's new ids and show the text they get back.

Only the ids since the last text are decoded again, after those of the last text:

    prompt ids ... | prefix ids (their text is out) | pending ids (not yet text)
                     <--------- decoded at each push --------->

The prefix keeps what a decoder does at the start of a text (dropping a leading space, say) away
from the middle of one. tokenizers' own DecodeStream works alike, but it has no flush and gives up
where invalid bytes change what a byte-fallback decoder said before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_serve.text.codec import rust_tokenizer

_REPLACEMENT = "\ufffd"
# A UTF-8 character takes at most four bytes: at most three ids hold the beginning of one, and a
# window of eight ids with text decodes its last character as the whole would.
_MAX_TAIL = 3
_WINDOW = 8
_MAX_PENDING = 16


class Detokenizer:
    """Incremental text of one request's output.

    The joined results of push are what decode(prompt + output) adds to decode(prompt), cut before
    the first stop string. The first is the one complete first, read character by character; of
    those complete at once, the longest. min_tokens: the text of the first min_tokens tokens is not
    searched. Characters of several tokens appear when complete, or at the end as U+FFFD.

    stop_hit: the stop string found, if any; push returns "" from then on.
    num_tokens: tokens taken, up to and including the one that completed the stop string.

    Raises SlowTokenizerError (no tokenizers backend), ValueError (an empty stop string).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        if isinstance(stop, str):
            raise ValueError(f"stop: must be a sequence of strings, got the string {stop!r}")
        if any(not string for string in stop):
            raise ValueError("stop: a stop string must not be empty")
        self._stream = _TextStream(rust_tokenizer(tokenizer), skip_special_tokens, prompt_token_ids)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held = ""  # text that may yet become part of a stop string
        self.stop_hit: str | None = None
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Takes the next tokens and returns the text that may be shown now ("" if none).

        final: nothing more comes; text held back is let go.
        """
        if self._stop:
            shown = self._push_searching(token_ids)
        else:
            self.num_tokens += len(token_ids)
            shown = self._stream.push(token_ids)
        if final and self.stop_hit is None:
            shown += self._search(self._stream.flush())
            if self.stop_hit is None:
                shown += self._held
                self._held = ""
        return shown

    def _push_searching(self, token_ids: Sequence[int]) -> str:
        shown = []
        for token_id in token_ids:  # one by one: which token completes a stop string is asked for
            if self.stop_hit is not None:
                break
            self.num_tokens += 1
            text = self._stream.push((token_id,))
            shown.append(self._search(text))
        return "".join(shown)

    def _search(self, text: str) -> str:
        """Adds text to what is held and returns the part that no stop string can reach any more."""
        if self.num_tokens <= self._min_tokens:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stop_hit = min(found)
            self._held = ""
            return text[:at]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning, but not the whole, of stop."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class _TextStream:
    """The incremental decoder proper: ids in, complete characters out."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._prefix = self._visible_tail(prompt_token_ids)
        self._prefix_length = len(self._decode(self._prefix))
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that token_ids complete; what ends within a character stays pending."""
        self._pending.extend(token_ids)
        # Ends short of the last id were tried by earlier pushes, but for those within token_ids.
        for tail in range(min(len(token_ids), _MAX_TAIL + 1)):
            ids = self._pending[: len(self._pending) - tail]
            text = self._decode(self._prefix + ids)
            if not text.endswith(_REPLACEMENT):
                return self._advance(text, ids)
        if len(self._pending) > _MAX_PENDING:
            return self._advance_invalid()
        return ""

    def flush(self) -> str:
        """The text of pending ids, complete or not."""
        text = self._decode(self._prefix + self._pending)[self._prefix_length :]
        self._prefix, self._prefix_length, self._pending = [], 0, []
        return text

    def _advance(self, text: str, ids: list[int]) -> str:
        """Lets out the text of ids, the first of the pending ones; they become the prefix."""
        delta = text[self._prefix_length :]
        if delta:  # else keep the old prefix: special tokens alone would make an empty one
            self._prefix, self._pending = ids, self._pending[len(ids) :]
            self._prefix_length = len(self._decode(self._prefix))
        return delta

    def _advance_invalid(self) -> str:
        """Lets out pending bytes that are no UTF-8, but for the last U+FFFD: it may become a character.

        Keeps the window, and so the time of a push, from growing with a long run of such bytes.
        """
        ids = self._prefix + self._pending
        delta = self._decode(ids)[self._prefix_length : -1]
        if delta:
            self._prefix, self._pending = [i for i in ids if self._decode([i])][-_WINDOW:], []
            self._prefix_length = len(self._decode(self._prefix)) - 1
        return delta

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    def _visible_tail(self, token_ids: Sequence[int]) -> list[int]:
        """The last few ids that have text and do not begin within a character."""
        size = _WINDOW
        while True:
            tail = list(token_ids[-size:])
            text = self._decode(tail)
            if size >= len(token_ids) or (text.strip() and _REPLACEMENT not in text):
                return tail
            size *= 2
