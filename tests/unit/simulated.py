"""A worker without a model: it keeps what each KV slot holds and checks every plan against it.

A position's KV is stood for by a checksum of all tokens up to it, and a sampled token is a function of the
sequence so far, so a wrong block, a stale block or a lost token shows as a wrong answer.
"""

from __future__ import annotations

from zlib import crc32

from ds_serve.messages import Request, SamplingParams, StepPlan, StepResult

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


class SimulatedWorker:
    """Runs plans at once and gives the results back in order, as a rank does."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.num_computed = 0
        self.max_step_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        for new in plan.new:
            self.tokens[new.slot] = list(new.token_ids)
            self.tables[new.slot] = []
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "a slot has two rows in one step"
        self.max_step_tokens = max(self.max_step_tokens, sum(row.count for row in plan.rows))
        for row in plan.rows:
            self.tables[row.slot] += row.new_block_ids
            self._write(row)
        sampled = []
        for row in plan.rows:
            self._check(row)
            tokens = self.tokens[row.slot]
            assert row.sample == (row.start + row.count == len(tokens)), "samples in mid-sequence"
            if row.sample:
                tokens.append(next_token(tokens))
                sampled.append(tokens[-1])
        return StepResult(step=plan.step, token_ids=sampled)

    def _write(self, row) -> None:
        tokens, table = self.tokens[row.slot], self.tables[row.slot]
        assert row.start + row.count <= len(tokens), "a row goes past the known tokens"
        assert row.start + row.count <= len(table) * self.block_size, "a row goes past its blocks"
        checksum = crc32(bytes(tokens[: row.start]))
        for position in range(row.start, row.start + row.count):
            checksum = crc32(bytes([tokens[position]]), checksum)
            self.kv[table[position // self.block_size]][position % self.block_size] = checksum
        self.num_computed += row.count

    def _check(self, row) -> None:
        """Every KV that this row attends to is there and is its own sequence's."""
        tokens, table = self.tokens[row.slot], self.tables[row.slot]
        checksum = 0
        for position in range(row.start + row.count):
            checksum = crc32(bytes([tokens[position]]), checksum)
            found = self.kv[table[position // self.block_size]][position % self.block_size]
            assert found == checksum, f"slot {row.slot}: wrong KV at position {position}"
