"""Which tokens the grammars of a step's requests allow next, computed beside the model's forward pass.

One matcher of llguidance's for each slot whose request has a grammar. All of them live on a thread of their
own: it compiles grammars, takes in what was drawn and computes masks (llguidance lets go of the interpreter's
lock meanwhile), so that the thread that runs steps only waits for what the device has not hidden. Knows no
logits and no request's text; of the tokenizer it knows the files. Driven by the sampler.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ds_serve.messages import SamplingParams

logger = logging.getLogger(__name__)

MAX_COMPILED = 64  # grammars kept compiled
WORD_BITS = 32  # of a mask's words
UNUSED_END = "<|ds_serve end|>"


class Constraints:
    """The grammars of any number of slots, for the model whose tokenizer lies in folder.

    Token ids are below vocab_size, which may be padded beyond the tokenizer's. Calls come from one thread;
    begin() and masks() alternate.
    """

    def __init__(self, folder: str | Path, vocab_size: int, *, trust_remote_code: bool = False) -> None:
        self._folder, self._vocab_size, self._trusts = Path(folder), vocab_size, trust_remote_code
        self._held: set[int] = set()
        self._drawn: dict[int, list[int]] = {}
        self._masks: Future[np.ndarray] | None = None
        self._thread = ThreadPoolExecutor(1, "ds-serve-grammars")
        # Of that thread:
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._matchers: dict[int, _Matcher | None] = {}

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

    def append(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """The token drawn for each slot; those without a grammar are passed over."""
        if self._held:
            for slot, token in zip(slots, token_ids, strict=True):
                if slot in self._held:
                    self._drawn.setdefault(slot, []).append(token)

    def begin(self, slots: Sequence[int]) -> None:
        """Starts computing what those of slots that have a grammar may draw next."""
        self._masks = None
        if self._held:
            rows = [slot for slot in slots if slot in self._held]
            if rows:
                drawn, self._drawn = self._drawn, {}
                self._masks = self._thread.submit(self._fill, rows, drawn)

    def masks(self) -> np.ndarray:
        """uint32 [G, W], one row for each of begin()'s slots that has a grammar, in their order.

        Bit t % 32 of word t // 32 says whether token t may be drawn. A row without any bit: none may.
        """
        if self._masks is None:
            raise RuntimeError("masks() without a begin() of a slot that has a grammar")
        return self._masks.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- on the thread -------------------------------------------------------------------------

    def _open(self, slot: int, params: SamplingParams, output_token_ids: list[int]) -> None:
        self._matchers[slot] = None
        try:
            matcher = self._compile(params.grammar)
        except Exception as error:  # transformers raises what it likes over a tokenizer's files
            logger.error("grammars: the tokenizer in %s cannot be used: %s", self._folder, error)
            return
        self._matchers[slot] = _Matcher(matcher, self._vocabulary, params.eos_token_ids)
        self._matchers[slot].advance(output_token_ids)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = self._compiled.get(grammar)
        if matcher is None:
            # Errors in full would quote what was drawn.
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0, limits=limits)
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher.deep_copy()

    def _fill(self, rows: list[int], drawn: dict[int, list[int]]) -> np.ndarray:
        for slot, token_ids in drawn.items():
            matcher = self._matchers[slot]
            if matcher is not None:
                matcher.advance(token_ids)
        masks = np.zeros((len(rows), -(-self._vocab_size // WORD_BITS)), dtype=np.uint32)
        for row, slot in enumerate(rows):
            matcher = self._matchers[slot]
            if matcher is not None:
                masks[row] = matcher.allowed()[: masks.shape[1]]
        return masks

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._folder, self._vocab_size, self._trusts)


class _Vocabulary:
    """llguidance's view of a tokenizer, read from its files."""

    def __init__(self, folder: Path, vocab_size: int, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer  # here: an engine that meets no grammar reads no tokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        ids = np.array(list(backend.get_vocab(with_added_tokens=True).values()))
        # llguidance treats its end token in a way of its own, so it gets one that no request can draw.
        backend.add_special_tokens([UNUSED_END])
        end = backend.token_to_id(UNUSED_END)
        self.tokenizer = LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, end + 1), eos_token=end)
        self.num_words = -(-self.tokenizer.vocab_size // WORD_BITS)
        self.named = np.zeros(self.num_words, dtype=np.uint32)  # ids that stand for something
        np.bitwise_or.at(self.named, ids // WORD_BITS, _bit(ids))


class _Matcher:
    """One sequence's place in its grammar.

    A text ends by any of the request's end tokens, exactly where its grammar may end: also by one that the
    grammar spells, if that is its last.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary, eos_token_ids: Sequence[int]) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        size = vocabulary.tokenizer.vocab_size
        self._ends = [token for token in eos_token_ids if 0 <= token < size]
        self._is_over = False

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes in what was drawn. After an end token nothing counts: the request is over."""
        for token in token_ids:
            if token in self._ends:
                self._is_over = True
            if self._is_over or not self._matcher.consume_token(token):
                return

    def allowed(self) -> np.ndarray:
        """uint32 [num_words]: the tokens that may come next; none once the grammar has failed or ended."""
        matcher, words = self._matcher, np.zeros(self._vocabulary.num_words, dtype=np.uint32)
        if not self._is_over:
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._is_over or matcher.is_error():
            if not self._is_over:
                logger.warning("a grammar failed: %s", matcher.stop_reason())
                self._is_over = True
            words[:] = 0
            return words
        words &= self._vocabulary.named
        may_end = matcher.is_accepting()
        for token in self._ends:
            if may_end:
                words[token // WORD_BITS] |= _bit(token)
            elif words[token // WORD_BITS] & _bit(token) and not self._ends_by(token):
                words[token // WORD_BITS] &= ~_bit(token)
        return words

    def _ends_by(self, token: int) -> bool:
        """Whether a grammar that spells an end token is at its end behind it."""
        matcher = self._matcher
        if not matcher.try_consume_tokens([token]):
            return False
        ends = matcher.is_accepting()
        matcher.rollback(1)
        return ends


def _bit(token):
    """uint32: the bit of a token's word that stands for it; also of an array of tokens."""
    return np.left_shift(np.uint32(1), np.asarray(token % WORD_BITS, dtype=np.uint32))
