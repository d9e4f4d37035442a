"""Batches of sequences that grow step by step, to run a backend on beside the reference in fp32."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ds_serve.attention.backends import Backend
from ds_serve.attention.context import AttentionBatch, HostRows
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend

BLOCK = 16
EXACT = 2e-5  # of outputs in float32: sums in another order
Inputs = list[tuple[torch.Tensor, ...]]  # q, k, v of each layer


@dataclass
class Layer:
    """An attention layer: what it gives to forward besides q, k and v."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    group: int = 0
    options: dict = field(default_factory=lambda: {"scale": 0.25})


class Sequences:
    """Sequences that grow in blocks of a shuffled pool. backend works on slab, the reference on wanted, which
    is the same in fp32. Block 0 is nobody's, and the last one is for padding rows."""

    def __init__(
        self,
        layers: list[Layer],
        backend: Backend,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        num_blocks: int = 64,
    ) -> None:
        self.layers, self.backend, self.dtype, self.device = layers, backend, dtype, torch.device(device)
        self.reference, self.scratch = ReferenceBackend(), num_blocks - 1
        shapes = tuple(LayerKV(layer.kv_heads, layer.dim, layer.dim) for layer in layers)
        self.layout = KVLayout(shapes, BLOCK, dtype, groups=tuple(layer.group for layer in layers))
        self.noise = torch.Generator(self.device).manual_seed(0)
        shuffled = torch.randperm(num_blocks - 2, generator=torch.Generator().manual_seed(0))
        self.num_groups = 1 + max(layer.group for layer in layers)
        self.free = (1 + shuffled).tolist()
        self.tables: dict[int, list[list[int]]] = {}
        self.lengths: dict[int, int] = {}
        self.slab = self.random(num_blocks, self.layout.block_elems)
        self.wanted = self.slab.float().clone()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.noise, device=self.device).to(self.dtype)

    def rows(self, counts: list[tuple[int, int]], reach: int = 0, pad: int = 0, width: int = 0):
        """Host rows and slots [group][T] after the given sequences grew by so many tokens, in this order."""
        slots, starts, lengths = [[] for _ in range(self.num_groups)], [0], []
        tables = [[] for _ in range(self.num_groups)]
        for sequence, count in counts:
            table = self.tables.setdefault(sequence, [[] for _ in range(self.num_groups)])
            begin = self.lengths.get(sequence, 0)
            self.lengths[sequence] = end = begin + count
            for group in range(self.num_groups):
                while len(table[group]) * BLOCK < end:
                    table[group].append(self.free.pop())
                gone = max(0, begin - reach + 1) // BLOCK if reach else 0
                tables[group].append([0] * gone + table[group][gone:])
                slots[group] += [table[group][p // BLOCK] * BLOCK + p % BLOCK for p in range(begin, end)]
            starts.append(starts[-1] + count)
            lengths.append(end)
        for row in range(pad):
            for group in range(self.num_groups):
                tables[group].append([self.scratch])
                slots[group].append(self.scratch * BLOCK + row)
            starts.append(starts[-1] + 1)
            lengths.append(1)
        width = max(width, *(len(table) for table in tables[0]))
        padded = tuple(np.array([t + [0] * (width - len(t)) for t in each], np.int32) for each in tables)
        return HostRows(np.array(starts, np.int32), np.array(lengths, np.int32), padded), slots

    def batch(self, rows: HostRows, slots: list[list[int]], with_host: bool = True) -> AttentionBatch:
        tables = [
            (torch.tensor(each, device=self.device), torch.from_numpy(table).to(self.device))
            for each, table in zip(slots, rows.tables, strict=True)
        ]
        return AttentionBatch(
            self.slab,
            self.layout,
            tables[0][0],
            torch.from_numpy(rows.query_start).to(self.device),
            torch.from_numpy(rows.context_len).to(self.device),
            tables[0][1],
            positions=torch.zeros(0),
            num_tokens=int(rows.query_start[-1]),
            more_groups=tuple(tables[1:]),
            host=rows if with_host else None,
        )

    def step(self, counts: list[tuple[int, int]], with_host: bool = True) -> AttentionBatch:
        return self.batch(*self.rows(counts), with_host)

    def qkv(self, tokens: int) -> Inputs:
        """q, k and v of each layer, as transformers gives them: [T,H,D] views of [H,T,D] memory."""
        return [
            tuple(
                self.random(heads, tokens, layer.dim).transpose(0, 1)
                for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
            )
            for layer in self.layers
        ]

    def run(self, batch: AttentionBatch, inputs: Inputs) -> list[torch.Tensor]:
        """The layers' outputs by backend."""
        return [
            self.backend.forward(index, *inputs[index], batch, **layer.options)
            for index, layer in enumerate(self.layers)
        ]

    def compare(self, batch: AttentionBatch, inputs: Inputs, bound: float = EXACT) -> None:
        """All layers of the step by both backends: the same slab, and outputs within bound."""
        self.check(batch, inputs, self.run(batch, inputs), bound)

    def check(
        self,
        batch: AttentionBatch,
        inputs: Inputs,
        found: list[torch.Tensor],
        bound: float,
        tokens: int | None = None,
        slab: bool = True,
    ) -> None:
        """The first tokens of the outputs found are the reference's, and so is the slab but for padding."""
        batch = AttentionBatch(**{**batch.__dict__, "slab": self.wanted})
        for index, layer in enumerate(self.layers):
            q, k, v = (x.float() for x in inputs[index])
            wanted = self.reference.forward(index, q, k, v, batch, **layer.options)
            error = (found[index].float() - wanted)[:tokens].abs().max()
            assert error <= bound, (layer, error)
        if slab:
            assert torch.equal(self.slab[1:-1].float(), self.wanted[1:-1])


FULL = {"scale": 0.25}
WINDOW = {"scale": 0.3, "window": 20}
CAPPED = {"scale": 0.3, "softcap": 3.0}
LAYERS = {
    "one kind": [Layer(), Layer()],
    "no groups": [Layer(heads=3, kv_heads=3)],
    "one KV head": [Layer(heads=5, kv_heads=1)],
    "window and full": [Layer(options=WINDOW), Layer(), Layer(options=CAPPED | {"window": 1})],
    "groups of layers": [Layer(options=WINDOW, group=1), Layer(options=CAPPED, group=0)],
}
STEPS = [
    [(0, 40), (1, 3), (2, 16)],
    [(1, 1), (2, 1), (0, 1)],
    [(2, 1), (0, 1), (3, 37), (1, 1)],
    [(4, 1), (3, 17), (0, 5)],
    [(3, 1), (1, 1), (4, 1)],
]


def compare_steps(sequences: Sequences, with_host: bool, bound: float = EXACT) -> None:
    """All STEPS by both backends, every other one prepared; what they used can be captured."""
    for index, step in enumerate(STEPS):
        batch = sequences.step(step, with_host)
        if index % 2:
            sequences.backend.prepare(batch)
        sequences.compare(batch, sequences.qkv(batch.num_tokens), bound)
    assert sequences.backend.captures
