"""When requests of an open loop are sent: independently of when earlier ones are answered.

Knows numbers only; load.py waits for these times.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Endless send times in seconds from the start, rate of them a second, gaps exponential."""
    return gamma(rate, 1.0, seed)


def gamma(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """As poisson, gaps of a gamma distribution of this shape: below 1 in bursts, above 1 evenly."""
    rng = np.random.default_rng([seed, 0xA771])
    now = 0.0
    while True:
        for gap in rng.gamma(burstiness, 1.0 / (rate * burstiness), 1024).tolist():
            now += gap
            yield now
