"""What the engine does, over the last minutes: ds_serve's /metrics, scraped once for all who look.

Knows Prometheus' text and the names in it; knows no page. The Engine tab reads it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ds_serve.chat.client import Server

INTERVAL_S = 1.0
SPAN_S = 180  # that is kept
_RATE_S = 3.0  # over which a rate is told
_PREFIX = "ds_serve_"
_NAMES = (
    "engine_up",
    "requests_running",
    "requests_waiting",
    "output_tokens_total",
    "prompt_tokens_total",
    "cached_tokens",
    "kv_usage_ratio",
    "kv_blocks",
    "preemptions",
    "stage_busy_seconds",
)


Values = dict[tuple[str, ...], float]


class Sample(NamedTuple):
    """Values at a moment of time.monotonic, as parse() gives them: ("kv_blocks", "used", "host")."""

    at: float
    values: Values

    def get(self, name: str, *labels: str) -> float:
        return self.values.get((name, *labels), 0.0)

    def sum(self, name: str) -> float:
        """Over all labels."""
        return sum(value for key, value in self.values.items() if key[0] == name)

    def labels(self, name: str) -> list[str]:
        return sorted(key[1] for key in self.values if key[0] == name and len(key) > 1)


def rate(before: Sample, after: Sample, read: Callable[[Sample], float]) -> float:
    """How fast a counter grew, a second; 0 where it began anew."""
    passed = after.at - before.at
    return max(0.0, read(after) - read(before)) / passed if passed > 0 else 0.0


class Engine:
    """The samples of one server; problem is a sentence while there are none to be had, or ""."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.samples: deque[Sample] = deque(maxlen=int(SPAN_S / INTERVAL_S))
        self.problem = "Not asked yet."

    async def watch(self) -> None:
        """Scrapes for ever."""
        key = self._server.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(headers=headers, timeout=5.0) as http:
            while True:
                await self._scrape(http)
                await asyncio.sleep(INTERVAL_S)

    async def _scrape(self, http: httpx.AsyncClient) -> None:
        url = f"{self._server.root}/metrics"
        try:
            reply = await http.get(url)
        except httpx.HTTPError:
            self.problem = f"No server answers at {url}. Start it, or wait until it is back."
            return
        if reply.status_code == 401:
            self.problem = f"{url} wants another API key. Set OPENAI_API_KEY and start the chat page again."
            return
        values = parse(reply.text) if reply.is_success else {}
        if ("engine_up",) not in values:
            self.problem = f"{url} has no metrics of ds_serve: this tab needs a ds_serve server."
            return
        up = values["engine_up",] > 0
        self.problem = "" if up else "The engine is down: it starts, or failed. The server's log says more."
        self.samples.append(Sample(time.monotonic(), values))

    def recent(self) -> tuple[Sample, Sample] | None:
        """The newest sample, and one _RATE_S before it, or as near to that as there is."""
        if len(self.samples) < 2:
            return None
        newest = self.samples[-1]
        earlier = [sample for sample in self.samples if newest.at - sample.at >= _RATE_S]
        return (earlier[-1] if earlier else self.samples[0]), newest


def parse(text: str) -> Values:
    """The wanted values of an exposition, by name and the values of its labels in their names' order."""
    wanted = tuple(f"{_PREFIX}{name}" for name in _NAMES)
    lines = "\n".join(line for line in text.splitlines() if line.startswith(wanted))
    return {
        (sample.name.removeprefix(_PREFIX).removesuffix("_total"), *_values(sample.labels)): sample.value
        for family in text_string_to_metric_families(lines + "\n")
        for sample in family.samples
    }


def _values(labels: dict[str, str]) -> list[str]:
    return [value for _, value in sorted(labels.items())]
