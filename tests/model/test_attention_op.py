"""The C++ op against the reference, over random ragged batches, several steps long."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_serve.attention import builder
from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch
from ds_serve.attention.cpu import CpuBackend
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend, region

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def _op():
    if builder.load_ops() is None:
        pytest.skip("the C++ op cannot be built here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another on shared cores take seconds
    yield
    torch.set_num_threads(threads)


@dataclass
class Rows:
    """Sequences that grow step by step in blocks of one shuffled pool."""

    block_size: int
    num_blocks: int
    seed: int

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.free = torch.randperm(self.num_blocks, generator=self.generator).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, counts: list[tuple[int, int]], slab: torch.Tensor, layout: KVLayout) -> AttentionBatch:
        """counts: (sequence, new tokens) in the batch's order."""
        slots, positions, start, lengths, tables = [], [], [0], [], []
        for sequence, count in counts:
            table = self.tables.setdefault(sequence, [])
            begin = self.lengths.get(sequence, 0)
            self.lengths[sequence] = begin + count
            while len(table) * self.block_size < begin + count:
                table.append(self.free.pop())
            for p in range(begin, begin + count):
                slots.append(table[p // self.block_size] * self.block_size + p % self.block_size)
                positions.append(p)
            start.append(len(slots))
            lengths.append(begin + count)
            tables.append(list(table))
        width = max(len(t) for t in tables) + 1
        return AttentionBatch(
            slab=slab,
            layout=layout,
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor(start, dtype=torch.int32),
            context_len=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
            positions=torch.tensor(positions),
            num_tokens=len(slots),
        )

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)


def qkv(rows: Rows, tokens: int, heads: int, layer: LayerKV, dtype: torch.dtype):
    """As transformers gives them: [T,H,D] views of [H,T,D] memory."""
    shapes = ((heads, layer.k_dim), (layer.num_kv_heads, layer.k_dim), (layer.num_kv_heads, layer.v_dim))
    q, k, v = (rows.random(h, tokens, d).to(dtype).transpose(0, 1) for h, d in shapes)
    return q, k, None if layer.v_in_k else v


def with_dtype(batch: AttentionBatch, slab: torch.Tensor, layout: KVLayout) -> AttentionBatch:
    return AttentionBatch(**{**batch.__dict__, "slab": slab, "layout": layout})


@st.composite
def layers(draw):
    heads, k_dim, v_dim = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 17)),
        draw(st.sampled_from([1, 3, 8, 9, 16])),
    )
    if draw(st.sampled_from([False, False, True])):  # any number of columns, also an odd one
        return LayerKV(heads, 8 * k_dim, draw(st.integers(1, 8 * k_dim)), v_in_k=True)
    return LayerKV(heads, 8 * k_dim, 8 * v_dim)


@st.composite
def cases(draw):
    steps = draw(
        st.lists(
            st.lists(st.sampled_from([0, 1, 1, 2, 7, 16, 33, 90, 300]), min_size=4, max_size=4).filter(any),
            min_size=1,
            max_size=4,
        )
    )
    return {
        "steps": steps,
        "block_size": draw(st.sampled_from([16, 16, 48])),
        "layer": draw(layers()),
        "group": draw(st.sampled_from([1, 2, 3, 4, 7])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "window": draw(st.sampled_from([None, None, 1, 13, 100, 257])),
        "chunk": draw(st.sampled_from([None, None, 1, 24, 128])),
        "softcap": draw(st.sampled_from([None, None, 3.0, 50.0])),
        "sinks": draw(st.booleans()),
        "key_bias": draw(st.sampled_from([None, None, 0, 5])),  # columns beyond the longest context
        "seed": draw(st.integers(0, 2**31)),
    }


@given(case=cases())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_op_equals_reference(case):
    dtype, layer = case["dtype"], case["layer"]
    heads = layer.num_kv_heads * case["group"]
    total = sum(map(sum, case["steps"]))
    rows = Rows(case["block_size"], total // case["block_size"] + 12, case["seed"])
    # Two layers, so that a write out of bounds of its region shows in the other.
    layout = KVLayout([layer, layer], case["block_size"], dtype)
    exact = KVLayout([layer, layer], case["block_size"], torch.float32)
    slab = layout.allocate(rows.num_blocks, "cpu").fill_(float("nan"))
    exact_slab = exact.allocate(rows.num_blocks, "cpu")
    untouched = slab.view(torch.uint8).clone()
    options = {k: case[k] for k in ("window", "chunk", "softcap")}
    options["scale"] = 1.3 * layer.k_dim**-0.5
    options["sinks"] = rows.random(heads) if case["sinks"] else None
    options["key_bias"] = None
    if case["key_bias"] is not None:
        options["softcap"] = None  # refused together
        longest = max(map(sum, zip(*case["steps"], strict=True)))
        options["key_bias"] = 3 * rows.random(heads, longest + case["key_bias"])
    for step in case["steps"]:
        counts = [(i, n) for i, n in enumerate(step) if n]
        batch = rows.step(counts, slab, layout)
        q, k, v = qkv(rows, batch.num_tokens, heads, layer, dtype)
        got = CpuBackend().forward(1, q, k, v, batch, **options)
        reference = with_dtype(batch, exact_slab, exact)
        exact_v = None if v is None else v.float()
        want = ReferenceBackend().forward(1, q.float(), k.float(), exact_v, reference, **options)
        torch.testing.assert_close(got.float(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    used = {b for table in rows.tables.values() for b in table}
    free = [b for b in range(rows.num_blocks) if b not in used]
    assert torch.equal(slab.view(torch.uint8)[free], untouched[free])
    first = layout.k_offset(1) * dtype.itemsize
    assert torch.equal(slab.view(torch.uint8)[:, :first], untouched[:, :first])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [LayerKV(2, 64, 64), LayerKV(1, 80, 64, v_in_k=True)], ids=["kv", "latent"])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(layer, dtype, biased):
    """Bit for bit: alone or with others, whole or in chunks of any size, one thread or two."""
    layout = KVLayout([layer], 16, dtype)
    rows = Rows(16, 200, 0)
    slab = layout.allocate(200, "cpu")
    backend = CpuBackend()
    options = {"scale": 0.125, "key_bias": rows.random(6, 701) if biased else None}
    full = rows.step([(0, 700), (1, 130)], slab, layout)
    q, k, v = qkv(rows, 830, 6, layer, dtype)
    together = backend.forward(0, q, k, v, full, **options)
    alone = Rows(16, 200, 1)
    other = layout.allocate(200, "cpu")
    try:
        parts = []
        for begin, end in ((0, 300), (300, 333), (333, 700)):
            batch = alone.step([(0, end - begin)], other, layout)
            own = (None if x is None else x[begin:end] for x in (q, k, v))
            parts.append(backend.forward(0, *own, batch, **options))
        assert torch.equal(torch.cat(parts), together[:700])
        one = rows.step([(0, 1)], slab, layout), alone.step([(0, 1)], other, layout)
        q, k, v = qkv(rows, 1, 6, layer, dtype)
        single = backend.forward(0, q, k, v, one[1], **options)
        torch.set_num_threads(2)
        assert torch.equal(backend.forward(0, q, k, v, one[0], **options), single)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("layer", [LayerKV(1, 16, 24), LayerKV(1, 72, 64, v_in_k=True)], ids=["kv", "latent"])
def test_what_a_former_owner_left_does_not_leak(layer):
    """A reused block holds NaN and infinities beyond the new sequence's end."""
    for dtype in (torch.float32, torch.bfloat16):
        layout = KVLayout([layer], 16, dtype)
        outputs = []
        for garbage in (0.0, float("nan"), float("inf")):
            rows = Rows(16, 4, 3)
            slab = layout.allocate(4, "cpu").fill_(garbage)
            results = []
            for count in (1, 3, 14, 1):
                batch = rows.step([(0, count)], slab, layout)
                q, k, v = qkv(rows, count, 2, layer, dtype)
                results.append(CpuBackend().forward(0, q, k, v, batch, scale=0.25))
            outputs.append(torch.cat(results))
        assert torch.isfinite(outputs[0]).all()
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_extreme_scores_stay_finite():
    layer = LayerKV(1, 16, 16)
    layout = KVLayout([layer], 16, torch.float32)
    rows = Rows(16, 8, 5)
    batch = rows.step([(0, 40)], layout.allocate(8, "cpu"), layout)
    q, k, v = qkv(rows, 40, 1, layer, torch.float32)
    for scale, sink in ((1e4, None), (1e-30, None), (-1.0, None), (1.0, 1e4), (1.0, -1e4)):
        sinks = None if sink is None else torch.tensor([sink])
        got = CpuBackend().forward(0, q, k, v, batch, scale=scale, sinks=sinks)
        fresh = with_dtype(batch, layout.allocate(8, "cpu"), layout)
        want = ReferenceBackend().forward(0, q, k, v, fresh, scale=scale, sinks=sinks)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_wrong_arguments_are_named():
    layer = LayerKV(1, 16, 16)
    layout = KVLayout([layer], 16, torch.float32)
    rows = Rows(16, 4, 7)
    slab = layout.allocate(4, "cpu")
    batch = rows.step([(0, 20)], slab, layout)
    q, k, v = qkv(rows, 20, 2, layer, torch.float32)
    forward = CpuBackend().forward
    wrong = {
        "slot_mapping": batch.slot_mapping + 64,
        "block_tables": batch.block_tables + 9,
        "context_len": batch.context_len + 100,
        "query_start": batch.query_start + 1,
    }
    for name, tensor in wrong.items():
        with pytest.raises(ValueError, match=name):
            forward(0, q, k, v, AttentionBatch(**{**batch.__dict__, name: tensor}), scale=1.0)
    with pytest.raises(ValueError, match="q: must be"):
        forward(0, q.bfloat16(), k, v, batch, scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        forward(0, q, k, v, batch, scale=1.0, sinks=torch.zeros(3))
    for bias in (torch.zeros(3, 64), torch.zeros(2, 19), torch.zeros(64, 2).t(), torch.zeros(2, 64).double()):
        with pytest.raises(ValueError, match="key_bias"):
            forward(0, q, k, v, batch, scale=1.0, key_bias=bias)
    with pytest.raises(ValueError, match="softcap"):
        forward(0, q, k, v, batch, scale=1.0, softcap=2.0, key_bias=torch.zeros(2, 64))
    inside = with_dtype(batch, slab, KVLayout([LayerKV(1, 16, 16, v_in_k=True)], 16, torch.float32))
    with pytest.raises(ValueError, match="v: has 24 columns"):
        forward(0, q, k, torch.zeros(20, 1, 24), inside, scale=1.0)
    assert not region(batch, 0, 1, 16).any(), "a refused call wrote into the slab"


def test_op_is_traceable():
    layer = LayerKV(1, 16, 16)
    layout = KVLayout([layer], 16, torch.float32)
    rows = Rows(16, 4, 8)
    batch = rows.step([(0, 20)], layout.allocate(4, "cpu"), layout)
    q, k, v = qkv(rows, 20, 2, layer, torch.float32)
    arguments = (q, k, v, batch.slab, 0, layout.v_offset(0), 16, batch.slot_mapping, batch.query_start)
    arguments += (batch.context_len, batch.block_tables, 1.0, 0, 0, 0.0, None, torch.zeros(2, 20))
    torch.library.opcheck(torch.ops.ds_serve.paged_attention.default, arguments)


def test_select_backend():
    assert select_backend("cpu", torch.bfloat16, 16).name == "cpu"
    assert select_backend("cpu", torch.float16, 16).name == "reference"
    assert select_backend("cpu", torch.bfloat16, 8).name == "reference"
    assert select_backend("cpu", torch.bfloat16, 16, "reference").name == "reference"
    with pytest.raises(RuntimeError, match="float16"):
        select_backend("cpu", torch.float16, 16, "cpu")
    with pytest.raises(ValueError, match="prefer"):
        select_backend("cpu", torch.float32, 16, "fast")
