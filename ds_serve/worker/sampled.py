"""What a step drew and scored, on its way from the logits' device to plain values.

Knows tensors and rows; neither slots nor how a token is chosen. Made by sampler.py, taken by the worker,
which starts the copies to the host when it launches a step and reads them when the device has got so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ds_serve.messages import INVALID_TOKEN, NO_TOKEN_FITS, TokenLogprob


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of L tokens: chosen float [L]; top_ids int64 and top float [L, N] of the likeliest.

    counts: how many of the N each of the L asked for.
    """

    counts: Sequence[int]
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def started(self) -> Logprobs:
        """On the host; see SampleOutput.started."""
        return Logprobs(self.counts, *map(_started, (self.chosen, self.top_ids, self.top)))

    def read(self) -> list[TokenLogprob]:
        columns = zip(
            self.counts, self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist(), strict=True
        )
        return [
            TokenLogprob(logprob=chosen, top_ids=ids[:count], top_logprobs=values[:count])
            for count, chosen, ids, values in columns
        ]


@dataclass(frozen=True)
class SampleOutput:
    """One sampled token a row, on the logits' device.

    token_ids int64 [R] (0 where a row is not valid), valid bool [R], and which of the others a grammar leaves
    nothing to (None: it is none of them) bool [R]. logprobs are of the rows logprob_rows, None: of none.
    """

    token_ids: torch.Tensor
    valid: torch.Tensor
    stuck: torch.Tensor | None = None
    logprob_rows: Sequence[int] = ()
    logprobs: Logprobs | None = None

    def started(self) -> SampleOutput:
        """The same on the host, whose copies are under way: to be read once the device has got so far."""
        return replace(
            self,
            token_ids=_started(self._told()),
            valid=None,
            stuck=None,
            logprobs=None if self.logprobs is None else self.logprobs.started(),
        )

    def to_host(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token ids, and beside them log-probabilities (an empty list where no row asked for any).

        The id is INVALID_TOKEN where a row's largest logit is NaN or infinite, NO_TOKEN_FITS where a grammar
        has forbidden all that are not.
        """
        token_ids = self._told().tolist()
        if self.logprobs is None:
            return token_ids, []
        found: list[TokenLogprob | None] = [None] * len(token_ids)
        for row, logprob in zip(self.logprob_rows, self.logprobs.read(), strict=True):
            found[row] = logprob
        return token_ids, found

    def _told(self) -> torch.Tensor:
        """int64 [R]: what to_host() says of each row; of what started() has copied, that copy."""
        if self.valid is None:
            return self.token_ids
        tokens = torch.where(self.valid, self.token_ids, INVALID_TOKEN)
        return tokens if self.stuck is None else tokens.masked_fill(self.stuck, NO_TOKEN_FITS)


@dataclass(frozen=True)
class ScoreOutput:
    """Log-probabilities of given tokens, one row of a step after another: sizes says how many are whose."""

    logprobs: Logprobs
    sizes: Sequence[int]

    def started(self) -> ScoreOutput:
        """As SampleOutput.started."""
        return ScoreOutput(self.logprobs.started(), self.sizes)

    def to_host(self) -> list[list[TokenLogprob]]:
        entries = iter(self.logprobs.read())
        return [[next(entries) for _ in range(size)] for size in self.sizes]


def _started(tensor: torch.Tensor) -> torch.Tensor:
    """tensor on the host. From a device into pinned memory, by a copy that nobody waits for."""
    return tensor.to("cpu", non_blocking=True)
