"""What a ds_serve server says of itself: its engine, and its cache's accounts before and after a run.

Knows the fields of its /health; any other server has no such accounts, and nothing is shown. Asks through a
function that gets a page.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

Page = Callable[[str], Awaitable[bytes | None]]

# Totals of the engine, by what a reader calls them.
TOTALS = {
    "prompt_tokens": "prompt tokens",
    "cached_tokens": "cached tokens",
    "cached_tokens_host": "of them from host",
    "loaded_blocks": "blocks loaded",
    "stored_blocks": "blocks stored",
    "evictions": "evictions",
    "host_evictions": "host evictions",
    "lost_blocks": "blocks lost",
    "num_preemptions": "preemptions",
    "num_steps": "steps",
}


class _Health(msgspec.Struct):
    engine: dict[str, Any]
    stats: dict[str, Any] | None = None


async def health(page: Page) -> _Health | None:
    """What a ds_serve server answers at /health; None from any other."""
    body = await page("/health")
    try:
        return None if body is None else msgspec.json.decode(body, type=_Health)
    except msgspec.DecodeError:
        return None


async def totals(page: Page) -> dict[str, float] | None:
    """The engine's totals by now; None where there are none to be had."""
    now = await health(page)
    if now is None or now.stats is None:
        return None
    return {name: now.stats[name] for name in TOTALS if isinstance(now.stats.get(name), int | float)}


def difference(before: dict[str, float] | None, after: dict[str, float] | None) -> dict[str, float] | None:
    """What a run added; None where a side is missing, or the server started anew in between."""
    if before is None or after is None or any(after.get(name, 0) < before[name] for name in before):
        return None
    return {name: after[name] - before[name] for name in before}
