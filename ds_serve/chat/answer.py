"""One answer as it comes: its text, its calls of tools, and how fast it was.

Knows OpenAI's chunks; knows no connection and no page. client.py fills it, talk.py and the tabs read it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Call:
    """A call of a tool; arguments is JSON as text, whole once the answer has ended."""

    id: str
    name: str
    arguments: str = ""

    def parsed(self) -> dict[str, Any] | None:
        """The arguments, or None where they are no JSON object (cut off by max_tokens)."""
        try:
            value = json.loads(self.arguments or "{}")
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def on_the_wire(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments or "{}"},
        }


@dataclass
class Answer:
    """What has come of an answer; moments are of time.perf_counter, 0 where nothing has happened yet."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Any = None
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    pieces: int = 0

    def take(self, chunk: Any) -> None:
        """Adds a chunk of the stream."""
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices[:1]:
            delta = choice.delta
            if delta.content or delta.tool_calls:
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.pieces += 1
            self.text += delta.content or ""
            for piece in delta.tool_calls or []:
                self._take_call(piece)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def _take_call(self, piece: Any) -> None:
        if piece.index >= len(self.calls):
            self.calls.append(Call(piece.id or f"call-{piece.index}", piece.function.name or ""))
        self.calls[piece.index].arguments += piece.function.arguments or ""

    def stats(self) -> str:
        """The line under an answer; "" where nothing came. Counts are the server's, where it sends usage."""
        if not self.first:
            return ""
        parts = [f"first token {_seconds(self.first - self.started)}"]
        tokens = self.usage.completion_tokens if self.usage else self.pieces
        if tokens > 1 and self.last > self.first:
            parts.append(f"{(tokens - 1) / (self.last - self.first):,.0f} tokens/s")
        parts.append(f"{tokens:,} token{'s' * (tokens != 1)}{'' if self.usage else ' or more'}")
        if self.usage:
            parts.append(_prompt(self.usage))
        return " · ".join(parts)


def _prompt(usage: Any) -> str:
    details = usage.prompt_tokens_details
    cached = (details and details.cached_tokens) or 0
    host = getattr(details, "host_cached_tokens", None) or 0
    return f"prompt {usage.prompt_tokens:,}: {cached - host:,} from device, {host:,} from host cache"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
