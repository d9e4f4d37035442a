"""The FlashInfer backend on a CPU, with fake_flashinfer in the library's place, against the reference."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import fake_flashinfer as fake
import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, COMMON, build, mixed_prompts, oracles, run_all, save
from transformers import AutoConfig

from ds_serve.attention import flashinfer
from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch, HostRows
from ds_serve.attention.flashinfer import FlashInferBackend
from ds_serve.attention.flashinfer_plan import Kind, pages_of
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend
from ds_serve.model import loader
from ds_serve.model.ahead import kernel_shapes

BLOCK = 16
CPU = torch.device("cpu")
SCRATCH = 63  # a block of padding rows
UNPACKED = Path("/tmp/fi/flashinfer")  # pip download --no-deps flashinfer-python==0.6.14, unzipped


@pytest.fixture(autouse=True)
def _small_and_exact(monkeypatch):
    """Also fp32, so that differences are mistakes, and heads as small as tiny models have them."""
    monkeypatch.setattr(flashinfer, "DTYPES", (torch.float32, *flashinfer.DTYPES))
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", (8, 16, *flashinfer.HEAD_DIMS))
    fake.num_plans.clear()
    fake.recording = None


@dataclass
class Layer:
    """An attention layer: what it gives to forward besides q, k and v."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    group: int = 0
    options: dict = field(default_factory=lambda: {"scale": 0.25})


class Sequences:
    """Sequences that grow in blocks of a shuffled pool, in a slab for each of two backends."""

    def __init__(self, layers: list[Layer], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.layers, self.dtype = layers, dtype
        shapes = tuple(LayerKV(layer.kv_heads, layer.dim, layer.dim) for layer in layers)
        self.layout = KVLayout(shapes, BLOCK, dtype, groups=tuple(layer.group for layer in layers))
        self.generator = torch.Generator().manual_seed(seed)
        self.num_groups = 1 + max(layer.group for layer in layers)
        self.free = (1 + torch.randperm(SCRATCH - 1, generator=self.generator)).tolist()
        self.tables: dict[int, list[list[int]]] = {}
        self.lengths: dict[int, int] = {}
        self.slab = torch.zeros(SCRATCH + 1, self.layout.block_elems, dtype=dtype)
        self.wanted = self.slab.clone()
        self.backend, self.reference = FlashInferBackend(CPU, dtype, fake), ReferenceBackend()

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
                tables[group].append([SCRATCH])
                slots[group].append(SCRATCH * BLOCK + row)
            starts.append(starts[-1] + 1)
            lengths.append(1)
        width = max(width, *(len(table) for table in tables[0]))
        padded = tuple(np.array([t + [0] * (width - len(t)) for t in each], np.int32) for each in tables)
        return HostRows(np.array(starts, np.int32), np.array(lengths, np.int32), padded), slots

    def batch(self, rows: HostRows, slots: list[list[int]], with_host: bool = True) -> AttentionBatch:
        tables = [(torch.tensor(s), torch.from_numpy(t)) for s, t in zip(slots, rows.tables, strict=True)]
        return AttentionBatch(
            self.slab,
            self.layout,
            tables[0][0],
            torch.from_numpy(rows.query_start),
            torch.from_numpy(rows.context_len),
            tables[0][1],
            positions=torch.zeros(0),
            max_query_len=int(np.diff(rows.query_start).max()),
            num_tokens=int(rows.query_start[-1]),
            more_groups=tuple(tables[1:]),
            host=rows if with_host else None,
        )

    def qkv(self, tokens: int) -> list[tuple[torch.Tensor, ...]]:
        """Of each layer, as transformers gives them: [T,H,D] views of [H,T,D] memory."""
        found = []
        for layer in self.layers:
            heads = (layer.heads, layer.kv_heads, layer.kv_heads)
            each = (torch.randn(h, tokens, layer.dim, generator=self.generator).to(self.dtype) for h in heads)
            found.append(tuple(x.transpose(0, 1) for x in each))
        return found

    def compare(self, batch: AttentionBatch, inputs: list, bound: float = 2e-5) -> None:
        """All layers of the step by both backends: the same slab, and outputs within bound."""
        found = [
            self.backend.forward(index, *inputs[index], batch, **layer.options)
            for index, layer in enumerate(self.layers)
        ]
        self.check(batch, inputs, found, bound)

    def check(self, batch: AttentionBatch, inputs: list, found: list, bound: float, tokens: int = -1) -> None:
        """The first tokens of the outputs found are the reference's, and so is the slab but for padding."""
        tokens = batch.num_tokens if tokens < 0 else tokens
        batch = AttentionBatch(**{**batch.__dict__, "slab": self.wanted})
        for index, layer in enumerate(self.layers):
            wanted = self.reference.forward(index, *inputs[index], batch, **layer.options)
            assert (found[index] - wanted)[:tokens].abs().max() <= bound, layer
        assert torch.equal(self.slab[:SCRATCH], self.wanted[:SCRATCH])


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


@pytest.mark.parametrize("with_host", [True, False], ids=["host", "no host"])
@pytest.mark.parametrize("layers", list(LAYERS))
def test_steps_are_those_of_the_reference(layers, with_host):
    sequences = Sequences(LAYERS[layers])
    for index, step in enumerate(STEPS):
        batch = sequences.batch(*sequences.rows(step), with_host)
        if index % 2:
            sequences.backend.prepare(batch)
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
    assert sequences.backend.captures


def test_bf16():
    sequences = Sequences([Layer(dim=64, options={"scale": 0.125})], torch.bfloat16)
    for step in STEPS:
        batch = sequences.batch(*sequences.rows(step))
        sequences.compare(batch, sequences.qkv(batch.num_tokens), bound=3e-2)


def test_a_kind_is_planned_once_a_step():
    sequences = Sequences([Layer(), Layer(options=WINDOW), Layer(), Layer(options=WINDOW)])
    prepared = sequences.batch(*sequences.rows(STEPS[0]))
    sequences.compare(prepared, sequences.qkv(prepared.num_tokens))  # tries the kinds
    fake.num_plans.clear()
    for step in STEPS[1:3]:
        batch = sequences.batch(*sequences.rows(step))
        sequences.backend.prepare(batch)
        planned = len(fake.num_plans)
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
        assert len(fake.num_plans) == planned
    assert fake.num_plans == ["plan", "plan"] + ["plan", "prefill"] * 2


def test_blocks_that_a_window_hides_are_not_read():
    sequences = Sequences([Layer(options=WINDOW), Layer(options=WINDOW)])
    inputs = sequences.rows([(0, 70), (1, 40)], reach=20)
    batch = sequences.batch(*inputs)
    sequences.compare(batch, sequences.qkv(batch.num_tokens))
    for slab in (sequences.slab, sequences.wanted):
        slab[0] = float("nan")
    for step in ([(0, 1), (1, 1)], [(0, 1), (1, 30)]):
        rows, slots = sequences.rows(step, reach=20)
        assert (rows.tables[0][0, :3] == 0).all()
        batch = sequences.batch(rows, slots)
        inputs = sequences.qkv(batch.num_tokens)
        found = [
            sequences.backend.forward(i, *inputs[i], batch, **layer.options)
            for i, layer in enumerate(sequences.layers)
        ]
        assert all(torch.isfinite(each).all() for each in found)
        wanted = AttentionBatch(**{**batch.__dict__, "slab": sequences.wanted})
        for i, layer in enumerate(sequences.layers):
            reference = sequences.reference.forward(i, *inputs[i], wanted, **layer.options)
            assert (found[i] - reference).abs().max() <= 2e-5


def test_pages():
    tables = (np.arange(1, 11, dtype=np.int32).reshape(2, 5),)
    rows = HostRows(np.array([0, 1, 8], np.int32), np.array([64, 70], np.int32), tables)
    pages = pages_of(rows, 0, None, BLOCK, 0, 2)
    assert pages.indptr.tolist() == [0, 4, 9]
    assert pages.indices.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert pages.last.tolist() == [16, 6]
    assert all(array.dtype == np.int32 for array in pages)
    # The first of the second row's seven tokens is at 63 and sees 32..63.
    windowed = pages_of(rows, 0, 32, BLOCK, 0, 2)
    assert windowed.indices.tolist() == [3, 4, 8, 9, 10]
    assert pages_of(rows, 0, 33, BLOCK, 1, 2).indices.tolist() == [7, 8, 9, 10]


def test_two_steps_planned_before_the_first_runs():
    sequences = Sequences(LAYERS["groups of layers"])
    first = sequences.batch(*sequences.rows(STEPS[0]))
    sequences.compare(first, sequences.qkv(first.num_tokens))
    second = sequences.batch(*sequences.rows(STEPS[1]))
    third = sequences.batch(*sequences.rows(STEPS[2]))
    sequences.backend.prepare(second)
    sequences.backend.prepare(third)
    sequences.compare(second, sequences.qkv(second.num_tokens))
    sequences.compare(third, sequences.qkv(third.num_tokens))


class Graph:
    """A captured step of rows one-token rows: static tensors, and what runs at a replay."""

    def __init__(self, sequences: Sequences, rows: int, width: int) -> None:
        self.sequences, self.count, self.width = sequences, rows, width
        host, slots = sequences.rows([], pad=rows, width=width)
        self.batch = sequences.batch(HostRows(*host_fields(host), graph=rows), slots)
        self.inputs = sequences.qkv(rows)
        self.run_layers()
        sequences.backend.prepare(self.batch)
        fake.recording = []
        self.out = self.run_layers()
        self.kernels, fake.recording = fake.recording, None

    def run_layers(self) -> list[torch.Tensor]:
        return [
            self.sequences.backend.forward(index, *self.inputs[index], self.batch, **layer.options)
            for index, layer in enumerate(self.sequences.layers)
        ]

    def replay(self, counts: list[tuple[int, int]]) -> None:
        """A decode step of counts, padded; compared with the reference."""
        sequences = self.sequences
        host, slots = sequences.rows(counts, pad=self.count - len(counts), width=self.width)
        step = sequences.batch(HostRows(*host_fields(host), graph=self.count), slots)
        inputs = sequences.qkv(self.count)
        for static, given in zip(self.inputs, inputs, strict=True):
            for x, y in zip(static, given, strict=True):
                x.copy_(y)
        sequences.backend.prepare(step)
        for out in self.out:
            out.fill_(float("nan"))
        # Kernels that write KV read static slots, which a replay gets anew like everything else.
        for index in range(len(sequences.layers)):
            keys, values = keys_values(sequences, index)
            flashinfer.write_kv(*inputs[index][1:], keys, values, step.tables(index)[0])
        for kernel in self.kernels:
            kernel()
        sequences.check(step, inputs, self.out, 2e-5, len(counts))


def host_fields(rows: HostRows) -> tuple:
    return rows.query_start, rows.context_len, rows.tables


def keys_values(sequences: Sequences, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer, layout = sequences.layers[index], sequences.layout
    batch = AttentionBatch(sequences.slab, layout, *[torch.empty(0)] * 5, max_query_len=0, num_tokens=0)
    return tuple(
        flashinfer.region(batch, offset(index), layer.kv_heads, layer.dim)
        for offset in (layout.k_offset, layout.v_offset)
    )


@pytest.mark.parametrize("layers", list(LAYERS))
def test_captured_steps_read_only_what_prepare_puts_there(layers):
    sequences = Sequences(LAYERS[layers])
    large, small = Graph(sequences, 6, 8), Graph(sequences, 4, 8)
    start = sequences.batch(*sequences.rows([(0, 40), (1, 3), (2, 16), (3, 31), (4, 1)]))
    sequences.compare(start, sequences.qkv(start.num_tokens))
    large.replay([(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)])
    small.replay([(2, 1), (0, 1)])
    mixed = sequences.batch(*sequences.rows([(3, 1), (5, 20)]))
    sequences.backend.prepare(mixed)
    sequences.compare(mixed, sequences.qkv(mixed.num_tokens))
    small.replay([(5, 1), (3, 1), (1, 1), (0, 1)])
    large.replay([(4, 1)])
    assert "fast" in fake.num_plans and sequences.backend.captures


def test_a_table_longer_than_its_graph_allows_is_an_error():
    sequences = Sequences([Layer()])
    graph = Graph(sequences, 2, 1)
    start = sequences.batch(*sequences.rows([(0, 100), (1, 1)]))
    sequences.compare(start, sequences.qkv(start.num_tokens))
    with pytest.raises(RuntimeError, match="give its batch tables as wide as they may become"):
        graph.replay([(0, 1), (1, 1)])


@pytest.mark.parametrize(
    "layer, reason",
    [
        (Layer(options=FULL | {"chunk": 8}), "is not used for chunked attention"),
        (Layer(options=FULL | {"sinks": torch.ones(4)}), "is not used for sinks"),
        (Layer(options=FULL | {"key_bias": torch.zeros(4, 64)}), "is not used for biases of keys"),
        (Layer(dim=24), "takes heads of 8, 16, 64, 128, 256, here keys have 24 and values 24 columns"),
    ],
    ids=["chunk", "sinks", "key_bias", "dim"],
)
def test_what_it_cannot_do_goes_to_the_reference_with_one_warning(layer, reason):
    sequences = Sequences([Layer(), layer])
    batch = sequences.batch(*sequences.rows(STEPS[0]))
    with pytest.warns(RuntimeWarning, match=f"4 heads, 2 KV heads of {layer.dim} .* FlashInfer {reason}"):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
    assert not sequences.backend.captures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = sequences.batch(*sequences.rows(STEPS[1]))
        sequences.compare(batch, sequences.qkv(batch.num_tokens))


def test_fp32_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(flashinfer, "DTYPES", (torch.bfloat16,))
    sequences = Sequences([Layer()])
    batch = sequences.batch(*sequences.rows(STEPS[0]))
    with pytest.warns(RuntimeWarning, match="computes in bfloat16 and float16, not in torch.float32"):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))


def test_captures_is_about_the_layers_now_served():
    sequences = Sequences([Layer(dim=24)])
    batch = sequences.batch(*sequences.rows(STEPS[0]))
    with pytest.warns(RuntimeWarning):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
    others = Sequences([Layer()])
    others.backend = sequences.backend
    batch = others.batch(*others.rows(STEPS[0]))
    others.compare(batch, others.qkv(batch.num_tokens))
    assert others.backend.captures


@pytest.mark.parametrize("failing", [True, False], ids=["raises", "differs"])
def test_a_kind_that_fails_its_trial_goes_to_the_reference(failing, monkeypatch):
    def run(self, q, cache, out, **options):
        if failing:
            raise RuntimeError("Ninja build failed.\nmore")
        return out.copy_(q)

    monkeypatch.setattr(fake.BatchPrefillWithPagedKVCacheWrapper, "run", run)
    reason = (
        "fails on a small problem: RuntimeError: Ninja build failed." if failing else "differs from it by"
    )
    sequences = Sequences([Layer()])
    batch = sequences.batch(*sequences.rows(STEPS[1]))
    with pytest.warns(RuntimeWarning, match=reason):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
    assert not sequences.backend.captures


def test_kinds():
    assert not Kind(8, 4, 64, 1.0, None, None, 0).tensor_cores
    assert Kind(32, 8, 128, 1.0, None, None, 0).tensor_cores
    assert str(Kind(32, 8, 128, 1.0, 512, None, 0)) == "32 heads, 8 KV heads of 128, window 512"


def test_select_backend():
    with pytest.raises(RuntimeError, match="'flashinfer' cannot run here: it computes on CUDA devices"):
        select_backend("cpu", torch.bfloat16, 16, "flashinfer")
    if importlib.util.find_spec("flashinfer") is None:
        with pytest.warns(RuntimeWarning, match=r"not installed: pip install 'ds_serve\[cuda\]'"):
            assert select_backend("cuda", torch.bfloat16, 16).name == "reference"


def test_select_backend_takes_it_on_cuda(monkeypatch):
    monkeypatch.setattr(flashinfer, "unavailable_reason", lambda device, dtype: None)
    monkeypatch.setattr(flashinfer.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(flashinfer, "Resources", lambda library, device, prefill: None)
    assert select_backend("cuda", torch.bfloat16, 16).name == "flashinfer"
    assert select_backend("cuda", torch.bfloat16, 16, "reference").name == "reference"


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_tokens_are_those_of_generate(architecture, tmp_path, monkeypatch, engine_of):
    def select(device, dtype, block_size, prefer):
        return FlashInferBackend(device, dtype, fake)

    monkeypatch.setattr(loader, "select_backend", select)
    model = build(architecture)
    prompts, lengths = mixed_prompts(12), [4 + (7 * index) % 17 for index in range(12)]
    wanted = oracles(model, prompts, lengths)
    engine = engine_of(
        model=save(model, tmp_path),
        num_blocks=24 if architecture == "llama" else 96,
        block_size=4,
        max_num_batched_tokens=64,
        injection="off",
        window_blocks="auto",
    )
    assert run_all(engine, prompts, lengths) == wanted
    assert run_all(engine, prompts, lengths) == wanted
    assert {"plan", "prefill"} <= set(fake.num_plans)


@pytest.mark.parametrize(
    "fields, shapes",
    [
        ({}, [(8, 2, False, False)]),
        ({"num_key_value_heads": 8, "head_dim": 64}, [(64, 1, False, False)]),
    ],
)
def test_kernel_shapes_of_llama(fields, shapes):
    assert kernel_shapes(AutoConfig.for_model("llama", **COMMON | fields)) == shapes


def test_kernel_shapes_of_windows():
    gemma = AutoConfig.for_model("gemma2", **ARCHITECTURES["gemma2"])
    assert kernel_shapes(gemma) == [(16, 2, False, True), (16, 2, True, True)]
    mistral = AutoConfig.for_model("mistral", **ARCHITECTURES["mistral"])
    assert kernel_shapes(mistral) == [(16, 2, True, False)]
    assert kernel_shapes(AutoConfig.for_model("deepseek_v3")) == []


@pytest.mark.parametrize(
    "prefill, group, wanted",
    [
        ("fa2", 4, {"fa2 64 window True cap False"}),
        ("fa3", 4, {"fa2 64 window True cap False", "fa3 64 window True cap False"}),
        ("fa3", 1, {"decode 64 window True cap False", "fa3 64 window True cap False"}),
        ("fa2", 1, {"decode 64 window True cap False", "fa2 64 window True cap False"}),
    ],
)
def test_builds_begin_ahead(prefill, group, wanted, monkeypatch):
    """The modules that a kind's plans load: prefill's, and on tensor cores fa2's, else decode's."""
    monkeypatch.setattr(flashinfer, "unavailable_reason", lambda device, dtype: None)
    monkeypatch.setattr(flashinfer.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(fake.utils, "determine_attention_backend", lambda *arguments: prefill)
    fake.built.clear()
    for thread in flashinfer.start_builds(CPU, torch.bfloat16, 64, group, True, False):
        thread.join()
    assert len(fake.built) == len(wanted) and set(fake.built) == wanted


def test_no_builds_where_flashinfer_cannot_run():
    assert flashinfer.start_builds(CPU, torch.bfloat16, 64, 4, False, False) == []


def test_the_stand_in_has_the_library_s_signatures():
    found = importlib.util.find_spec("flashinfer")
    folder = Path(found.origin).parent if found else UNPACKED
    if not folder.is_dir():
        pytest.skip("flashinfer-python's sources are not here")
    ours = signatures(Path(fake.__file__))
    theirs = {}
    for module in ("decode.py", "prefill.py", "utils.py", "jit/attention/modules.py"):
        theirs |= signatures(folder / module)
    for wrapper in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"):
        for method in ("__init__", "plan", "run"):
            assert ours[wrapper, method] == theirs[wrapper, method], (wrapper, method)
        assert ours["_Wrapper", "reset_workspace_buffer"] == theirs[wrapper, "reset_workspace_buffer"]
    assert ours["", "fast_decode_plan"] == theirs["", "fast_decode_plan"]
    for name in ("determine_attention_backend", "gen_batch_prefill_module", "gen_batch_decode_module"):
        assert ours["", f"_{name}"] == theirs["", name]


def signatures(path: Path) -> dict[tuple[str, str], list[tuple[str, str | None]]]:
    """(class or "", function) -> its arguments with their defaults, of the last definition of that name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = node.name if isinstance(node, ast.ClassDef) else ""
        for each in members:
            if isinstance(each, ast.FunctionDef):
                given = each.args
                positional = given.posonlyargs + given.args
                defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
                arguments = list(zip(positional, defaults, strict=True))
                arguments += list(zip(given.kwonlyargs, given.kw_defaults, strict=True))
                found[owner, each.name] = [(a.arg, d and ast.unparse(d)) for a, d in arguments]
    return found
