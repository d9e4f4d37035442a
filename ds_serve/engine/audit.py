"""Shadow audits: a sampled prefix hit is computed twice more, through the cache and without it, and compared.

The two are requests of the engine's own, behind all others, for one token each. Knows no queue and no cache:
the scheduler says when there was a hit, runs the requests and hands their outputs back.
"""

from __future__ import annotations

import sys

from ds_serve.messages import Output, Request, SamplingParams

# No front may use such an id.
RESERVED = "\0"
NUM_LOGPROBS = 20
LAST_PRIORITY = sys.maxsize

_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, logprobs=NUM_LOGPROBS)


class Auditor:
    """share: of prefix hits, those that are sampled: every round(1 / share)-th; 0: none."""

    def __init__(self, share: float) -> None:
        self._every = round(1 / share) if share else 0
        self._num_hits = 0
        self._open: set[str] = set()
        self._found: list[dict[int, float]] = []  # log probabilities by token id
        self.num_audits = 0
        self.max_difference = 0.0

    @property
    def open_ids(self) -> list[str]:
        """Ids of the requests that have not ended: of one audit, since there is one at a time."""
        return list(self._open)

    def is_sampled(self) -> bool:
        """Counts one more prefix hit; whether it is to be audited."""
        self._num_hits += 1
        return bool(self._every) and self._num_hits % self._every == 0

    def start(self, request: Request) -> tuple[Request, Request]:
        """The two requests that audit this one's prompt: through the cache, and not."""
        if self._open:
            raise ValueError(f"an audit is running already: {sorted(self._open)}")
        pair = tuple(
            Request(
                id=f"{RESERVED}audit-{how}-{request.id}",
                prompt_token_ids=request.prompt_token_ids,
                params=_PARAMS,
                salt=request.salt,
                adapter=request.adapter,
                priority=LAST_PRIORITY,
            )
            for how in ("cached", "computed")
        )
        self._open = {each.id for each in pair}
        self._found = []
        return pair

    def take(self, output: Output) -> None:
        """One of the two has ended; one that gave no token leaves nothing to compare."""
        self._open.discard(output.id)
        if output.logprobs:
            (found,) = output.logprobs
            self._found.append(dict(zip(found.top_ids, found.top_logprobs, strict=True)))
        if not self._open and len(self._found) == 2:
            cached, computed = self._found
            differences = [abs(cached[token] - computed[token]) for token in cached.keys() & computed.keys()]
            self.num_audits += 1
            self.max_difference = max([self.max_difference, *differences])
