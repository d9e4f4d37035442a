"""Which tokens the grammars of a step's requests allow next, computed beside the model's forward pass.

One matcher of llguidance's for each slot whose request has a grammar. All of them live on a thread of their
own: it compiles grammars, takes in what was drawn and computes masks (llguidance lets go of the interpreter's
lock meanwhile), so that the thread that runs steps only waits for what the device has not hidden. Knows no
logits and no request's text; of the tokenizer it knows the files. Made by cluster.py, driven by the sampler.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from ds_serve.messages import SamplingParams

logger = logging.getLogger(__name__)

MAX_COMPILED = 64  # grammars kept compiled
WORD_BITS = 32  # of a mask's words
UNUSED_END = "<|ds_serve end|>"


class Constraints:
    """The grammars of any number of slots, for the model whose tokenizer lies in folder.

    The tokenizer, which takes seconds where it is large, is read in the background from now on, or, where the
    folder seems to have none, at the first grammar. Calls come from one thread.
    """

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        self._folder, self._trusts = Path(folder), trust_remote_code
        self._held: set[int] = set()
        self._drawn: dict[int, list[int]] = {}
        self._masks: Future[np.ndarray] | None = None
        self._thread = ThreadPoolExecutor(1, "ds-serve-grammars")
        # Of that thread:
        self._executor = LLExecutor(num_threads=max(1, (os.cpu_count() or 1) // 4))
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._matchers: dict[int, _Matcher | None] = {}  # None: there is no tokenizer to make one for
        self._reading: Future[object] | None = None
        if any(self._folder.glob("tokenizer*")):
            self._reading = self._thread.submit(lambda: self._vocabulary)

    def wait(self) -> None:
        """Until the tokenizer has been read, well or ill."""
        if self._reading is not None:
            self._reading.exception()

    def admit(self, slot: int, params: SamplingParams, output_token_ids: list[int]) -> None:
        """A sequence with a grammar takes a slot, with the output that it has already. Compiles behind."""
        self._held.add(slot)
        self._drawn.pop(slot, None)
        self._thread.submit(self._open, slot, params, output_token_ids)

    def release(self, slot: int) -> None:
        """Forgets what the slot held, if anything."""
        if slot in self._held:
            self._held.remove(slot)
            self._drawn.pop(slot, None)
            self._thread.submit(self._matchers.pop, slot, None)

    def holds(self, slot: int) -> bool:
        """Whether the slot's sequence has a grammar."""
        return slot in self._held

    def append(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """The token drawn for each slot; those without a grammar are passed over."""
        for slot, token in zip(slots, token_ids, strict=True):
            if slot in self._held:
                self._drawn.setdefault(slot, []).append(token)

    def begin(self, slots: Sequence[int]) -> None:
        """Starts computing what those of slots that have a grammar may draw next."""
        rows = [slot for slot in slots if slot in self._held] if self._held else []
        self._masks = None
        if rows:
            drawn, self._drawn = self._drawn, {}
            self._masks = self._thread.submit(self._fill, rows, drawn)

    def masks(self) -> np.ndarray:
        """uint32 [G, W], one row for each of begin()'s slots that has a grammar, in their order.

        Bit t % 32 of word t // 32 says whether token t may be drawn, and tokens beyond the last word may not.
        A row without any bit: the grammar leaves nothing, or it failed.
        """
        if self._masks is None:
            raise RuntimeError("masks() without a begin() of a slot that has a grammar")
        return self._masks.result()

    def close(self) -> None:
        """Ends the thread. May be called twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- on the thread -------------------------------------------------------------------------

    def _open(self, slot: int, params: SamplingParams, output_token_ids: list[int]) -> None:
        self._matchers[slot] = None
        try:
            vocabulary = self._vocabulary
        except Exception as error:  # transformers raises what it likes over a tokenizer's files
            logger.error("grammars: the tokenizer in %s cannot be used: %s", self._folder, error)
            return
        matcher = self._compile(params.grammar, vocabulary)
        self._matchers[slot] = _Matcher(matcher, vocabulary, params.eos_token_ids)
        self._matchers[slot].advance(output_token_ids)

    def _compile(self, grammar: str, vocabulary: _Vocabulary) -> LLMatcher:
        matcher = self._compiled.get(grammar)
        if matcher is None:
            # Errors in full would quote what was drawn.
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher.deep_copy()

    def _fill(self, rows: list[int], drawn: dict[int, list[int]]) -> np.ndarray:
        for slot, token_ids in drawn.items():
            if (matcher := self._matchers[slot]) is not None:
                matcher.advance(token_ids)
        matchers = [self._matchers[slot] for slot in rows]
        num_words = max(0 if matcher is None else matcher.vocabulary.num_words for matcher in matchers)
        masks = np.zeros((len(rows), num_words), dtype=np.uint32)
        live = [
            (matcher, row) for row, matcher in enumerate(matchers) if matcher is not None and matcher.is_live
        ]
        if live:  # in one call: each takes the interpreter's lock from the thread that runs steps
            jobs = [(matcher.matcher, row) for matcher, row in live]
            self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, masks.strides[0], len(rows))
        for matcher, row in live:
            matcher.settle(masks[row])
        return masks

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._folder, self._trusts)


class _Vocabulary:
    """llguidance's view of a tokenizer, read from its files."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer  # here, since an engine may meet no grammar

        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        ids = np.array(list(backend.get_vocab(with_added_tokens=True).values()))
        # llguidance treats its end token in a way of its own, so it gets one that no request can draw.
        backend.add_special_tokens([UNUSED_END])
        self.tokenizer = LLTokenizer(backend.to_str(), eos_token=backend.token_to_id(UNUSED_END))
        self.num_words = -(-self.tokenizer.vocab_size // WORD_BITS)
        self.drawable = np.zeros(self.num_words, dtype=np.uint32)
        np.bitwise_or.at(self.drawable, ids // WORD_BITS, _bit(ids))


class _Matcher:
    """One sequence's place in its grammar.

    A text ends by any of the request's end tokens, exactly where its grammar may end: also by one that the
    grammar spells, if that is its last.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary, eos_token_ids: Sequence[int]) -> None:
        self.vocabulary = vocabulary
        self.matcher = matcher
        self._ends = [token for token in eos_token_ids if 0 <= token < vocabulary.tokenizer.vocab_size]
        self.is_live = True  # it has neither ended nor failed

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes in what was drawn. After an end token nothing counts: the request is over."""
        for token in token_ids:
            if token in self._ends:
                self.is_live = False
            if not self.is_live or not self.matcher.consume_token(token):
                return

    def settle(self, words: np.ndarray) -> None:
        """Makes of llguidance's mask, uint32 [num_words], the tokens that may come next."""
        matcher = self.matcher
        if matcher.is_error():
            logger.warning("a grammar failed: %s", matcher.stop_reason())
            self.is_live = False
            words[:] = 0
            return
        words &= self.vocabulary.drawable
        may_end = matcher.is_accepting()
        for token in self._ends:
            word, bit = token // WORD_BITS, _bit(token)
            if may_end:
                words[word] |= bit
            elif words[word] & bit and not self._ends_by(token):
                words[word] &= ~bit

    def _ends_by(self, token: int) -> bool:
        """Whether a grammar that spells an end token is at its end behind it."""
        if not self.matcher.try_consume_tokens([token]):
            return False
        ends = self.matcher.is_accepting()
        self.matcher.rollback(1)
        return ends


def _bit(token):
    """uint32: the bit of a token's word that stands for it; also of an array of tokens."""
    return np.left_shift(np.uint32(1), np.asarray(token % WORD_BITS, dtype=np.uint32))
