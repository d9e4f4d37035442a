"""Workers without a model: they keep what each KV slot holds and check every plan against it.

A position's KV is stood for by a checksum of all tokens up to it, and a sampled token is a function of the
sequence so far, so a wrong block, a stale block or a lost token shows as a wrong answer.
"""

from __future__ import annotations

from zlib import crc32

from ds_serve.messages import Request, Row, SamplingParams, StepPlan, StepResult

VOCAB = 50


def next_token(tokens: list[int]) -> int:
    return crc32(bytes(tokens)) % VOCAB


def expected_output(request: Request) -> list[int]:
    """What any schedule must give: tokens until an end token or max_tokens."""
    tokens = list(request.prompt_token_ids)
    params = request.params
    for produced in range(1, params.max_tokens + 1):
        tokens.append(next_token(tokens))
        if tokens[-1] in params.end_token_ids and produced >= params.min_tokens:
            break
    return tokens[len(request.prompt_token_ids) :]


def make_request(name: object, prompt: list[int], max_tokens: int, **fields) -> Request:
    params = {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__struct_fields__}
    params = SamplingParams(max_tokens=max_tokens, **params)
    return Request(id=str(name), prompt_token_ids=prompt, params=params, **fields)


class _Stage:
    """One stage's KV. It knows no tokens but those of a row, handed on as hidden states are."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        # A position holds its token and the checksum of all tokens up to it.
        self.kv: list[list[tuple[int, int]]] = [[(-1, -1)] * block_size for _ in range(num_blocks)]
        self.tables: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def write(self, row: Row, tokens: list[int]) -> None:
        table = self.tables[row.slot]
        table += row.new_block_ids
        assert row.start + row.count <= len(table) * self.block_size, "a row goes past its blocks"
        checksum = self._at(row.slot, row.start - 1)[1] if row.start else 0
        for position, token in enumerate(tokens, row.start):
            checksum = crc32(bytes([token]), checksum)
            self.kv[table[position // self.block_size]][position % self.block_size] = (token, checksum)

    def attend(self, row: Row) -> int:
        """The checksum of the row's sequence, after every KV on the way to it was found to be its own."""
        checksum = 0
        for position in range(row.start + row.count):
            token, found = self._at(row.slot, position)
            assert token >= 0, f"slot {row.slot}: position {position} was never written"
            checksum = crc32(bytes([token]), checksum)
            assert found == checksum, f"slot {row.slot}: wrong KV at position {position}"
        return checksum

    def _at(self, slot: int, position: int) -> tuple[int, int]:
        return self.kv[self.tables[slot][position // self.block_size]][position % self.block_size]


class SimulatedWorker:
    """Runs plans at once and gives the results back in order, as the ranks do.

    One stage remembers the tokens that it draws. Of several, the first knows what plans tell it and no more,
    and the last draws.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, num_stages: int = 1) -> None:
        self.stages = [_Stage(num_blocks, block_size, max_num_seqs) for _ in range(num_stages)]
        self.tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.num_computed = 0
        self.max_step_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        for new in plan.new:
            self.tokens[new.slot] = list(new.token_ids)
            for stage in self.stages:
                stage.tables[new.slot] = []
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "a slot has two rows in one step"
        num_tokens = sum(row.count for row in plan.rows)
        self.num_computed += num_tokens
        self.max_step_tokens = max(self.max_step_tokens, num_tokens)
        inputs = [self._inputs(row) for row in plan.rows]
        for stage in self.stages:
            for row, tokens in zip(plan.rows, inputs, strict=True):
                stage.write(row, tokens)
            checksums = [stage.attend(row) for row in plan.rows]
        sampled = [sum_ % VOCAB for row, sum_ in zip(plan.rows, checksums, strict=True) if row.sample]
        if len(self.stages) == 1:
            for slot, token in zip((row.slot for row in plan.rows if row.sample), sampled, strict=True):
                self.tokens[slot].append(token)
        return StepResult(step=plan.step, token_ids=sampled)

    def _inputs(self, row: Row) -> list[int]:
        """The row's tokens, which the first stage must know by now."""
        known, end = self.tokens[row.slot], row.start + row.count
        if row.token_ids:
            assert len(self.stages) > 1, "one stage remembers its tokens itself"
            assert len(known) + len(row.token_ids) == end, (
                "token_ids are not the row's last, or known already"
            )
            known += row.token_ids
        assert end <= len(known), "a row goes past the known tokens"
        assert row.sample == (end == len(known)), "samples in mid-sequence"
        return known[row.start : end]
