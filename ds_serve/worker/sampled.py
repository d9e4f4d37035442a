"""What a step drew, on its way from the logits' device to plain values.

Knows tensors and rows; neither slots nor how a token is chosen. Made by sampler.py, taken by the worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_serve.messages import INVALID_TOKEN, NO_TOKEN_FITS, TokenLogprob


@dataclass(frozen=True)
class SampleOutput:
    """One sampled token a row, on the logits' device; to_host waits for it.

    token_ids int64 [R] (0 where a row is not valid), valid bool [R], and which of the others a grammar leaves
    nothing to (None: it is none of them) bool [R]. Of the L rows that asked for
    log-probabilities: logprob_rows gives (row, number of alternatives), chosen float [L],
    top_ids int64 and top_logprobs float [L, N] with N the largest number asked for.
    """

    token_ids: torch.Tensor
    valid: torch.Tensor
    stuck: torch.Tensor | None = None
    logprob_rows: tuple[tuple[int, int], ...] = ()
    chosen: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def to_host(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token ids, and beside them log-probabilities (an empty list where no row asked for any).

        The id is INVALID_TOKEN where a row's largest logit is NaN or infinite, NO_TOKEN_FITS where a grammar
        has forbidden all that are not.
        """
        tokens = torch.where(self.valid, self.token_ids, INVALID_TOKEN)
        if self.stuck is not None:
            tokens = tokens.masked_fill(self.stuck, NO_TOKEN_FITS)
        token_ids = tokens.tolist()
        if not self.logprob_rows:
            return token_ids, []
        logprobs: list[TokenLogprob | None] = [None] * len(token_ids)
        columns = zip(self.chosen.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        for (row, count), (chosen, ids, values) in zip(self.logprob_rows, columns, strict=True):
            logprobs[row] = TokenLogprob(logprob=chosen, top_ids=ids[:count], top_logprobs=values[:count])
        return token_ids, logprobs
