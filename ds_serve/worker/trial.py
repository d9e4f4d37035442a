"""A decode step to try graphs with, before there are requests. Knows arrays only. Used by graphs.py."""

from __future__ import annotations

import numpy as np

from ds_serve.messages import NewSequence, Row, SamplingParams
from ds_serve.worker.slots import HostStep, SlotTable


def trial_step(
    rows: int,
    num_blocks: int,
    block_size: int,
    groups: int,
    max_model_len: int,
    vocab_size: int,
    number: int = 0,
) -> HostStep:
    """A decode step of one row less than rows, or of as many as blocks are there for; of one at least.

    Contexts of all lengths up to two blocks, others for another number, each row in blocks of its own, from
    block 0 on. Every other token is in the pool.
    """
    each = min(2, num_blocks // groups)
    count = max(1, min(rows - 1, num_blocks // (each * groups)))
    longest = min(each * block_size, max_model_len)
    table = SlotTable(count, longest, block_size, groups)
    random = np.random.default_rng((rows, number))
    steps = []
    for slot in range(count):
        start = (7 * slot + 11 * number) % longest
        known = start + slot % 2
        token_ids = random.integers(0, vocab_size, known).tolist()
        params = SamplingParams(max_tokens=1)
        table.admit(NewSequence(slot=slot, token_ids=token_ids, num_prompt_tokens=known, params=params))
        first = slot * each * groups
        blocks = list(range(first, first + (start // block_size + 1) * groups))
        steps.append(Row(slot=slot, start=start, count=1, new_block_ids=blocks, sample=True))
    return table.gather(steps)
