"""Keeps Python's cycle collector away from what is imported: it is never garbage, and there is a lot of it.

torch, DeepSpeed and transformers make some 600,000 objects that live as long as their process. Looking
through them again and again takes a sixth of the import, and a quarter of a second each time after. Knows
nothing of this package. Called by rank.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collections in the block; what it has made is old afterwards, without having been looked through."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if not frozen:  # else who froze objects wants them to stay so
            gc.unfreeze()
        if enabled:
            gc.enable()
