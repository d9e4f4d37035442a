"""What is known of one request: when it was sent, what came back, how it ended.

Knows numbers only. Written by client.py and load.py, read by summary.py and the reports. Times are
perf_counter's seconds, 0 where there was no such moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_serve.bench.endpoints import Usage

INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Record:
    """One request. intended is when it should have been sent (closed loop: when it was), kind why it failed.

    times are when pieces of the output came. Where the server gave no usage, output_tokens is their number,
    and the prompt's tokens are not known.
    """

    index: int
    prompts: int = 1
    intended: float = 0.0
    sent: float = 0.0
    end: float = 0.0
    status: int = 0
    kind: str = ""
    detail: str = ""
    times: list[float] = field(default_factory=list)
    usage: Usage | None = None

    def fail(self, kind: str, detail: str = "") -> None:
        self.kind, self.detail = kind, detail

    def count(self, usage: Usage) -> None:
        self.usage = usage

    @property
    def good(self) -> bool:
        return not self.kind

    @property
    def output_tokens(self) -> int:
        return len(self.times) if self.usage is None else self.usage.output

    @property
    def lateness(self) -> float:
        return self.sent - self.intended

    @property
    def e2e(self) -> float:
        """Seconds from the intended time to the end."""
        return self.end - self.intended

    @property
    def ttft(self) -> float | None:
        """Seconds from the intended time to the first token; None where nothing was streamed."""
        return self.times[0] - self.intended if self.times else None

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for fewer than two tokens."""
        tokens = self.output_tokens
        if len(self.times) < 2 or tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces. A piece is a token, unless the server merges several."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
