"""The progress bar: how many requests are done, run and failed.

Knows a Load and the terminal. On stderr, so that the report can be piped.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from tqdm import tqdm

from ds_serve.bench.load import Load

_EVERY_S = 0.2


@asynccontextmanager
async def progress(
    load: Load, shown: bool | None, requests: int | None, duration: float | None, name: str
) -> AsyncIterator[None]:
    """Shows load while the context is open. By requests where their number is known, else by seconds."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield
        return
    total = requests if requests is not None else round(duration or 0.0, 1)
    unit = "req" if requests is not None else "s"
    with tqdm(total=total, unit=unit, desc=name, file=sys.stderr, dynamic_ncols=True) as bar:

        def update() -> None:
            bar.n = load.done if requests is not None else min(total, round(perf_counter() - load.started, 1))
            bar.set_postfix_str(f"{load.done} done, {load.running} running, {load.failed} failed")

        async def keep_updating() -> None:
            while True:
                update()
                await asyncio.sleep(_EVERY_S)

        updating = asyncio.create_task(keep_updating())
        try:
            yield
        finally:
            updating.cancel()
            update()
