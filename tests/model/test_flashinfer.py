"""The FlashInfer backend on a CPU, with fake_flashinfer in the library's place, against the reference."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from pathlib import Path

import fake_flashinfer as fake
import numpy as np
import pytest
import torch
from paged_sequences import BLOCK, EXACT, FULL, LAYERS, STEPS, WINDOW, Layer, Sequences, compare_steps
from tiny_models import ARCHITECTURES, COMMON, build, mixed_prompts, oracles, run_all, save
from transformers import AutoConfig

from ds_serve.attention import flashinfer
from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch, HostRows
from ds_serve.attention.flashinfer import FlashInferBackend
from ds_serve.attention.flashinfer_plan import Kind, Planner, Resources, pages_of
from ds_serve.config import Settings
from ds_serve.model import loader
from ds_serve.model.ahead import begin_builds, kernel_shapes

CPU = torch.device("cpu")
UNPACKED = Path("/tmp/fi/flashinfer")  # pip download --no-deps flashinfer-python==0.6.14, unzipped


@pytest.fixture(autouse=True)
def _small_and_exact(monkeypatch):
    """Also fp32, so that differences are mistakes, and heads as small as tiny models have them."""
    monkeypatch.setattr(flashinfer, "DTYPES", (torch.float32, *flashinfer.DTYPES))
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", (8, 16, *flashinfer.HEAD_DIMS))
    fake.num_plans.clear()
    fake.recording = None


def started(layers: list[Layer], dtype: torch.dtype = torch.float32) -> Sequences:
    return Sequences(layers, FlashInferBackend(CPU, dtype, fake), dtype)


@pytest.mark.parametrize("with_host", [True, False], ids=["host", "no host"])
@pytest.mark.parametrize("layers", list(LAYERS))
def test_steps_are_those_of_the_reference(layers, with_host):
    compare_steps(started(LAYERS[layers]), with_host)


def test_a_batch_without_host_is_read_at_each_pass():
    sequences = started([Layer(), Layer()])
    batch = sequences.step([(0, 20), (1, 9)], with_host=False)
    sequences.compare(batch, sequences.qkv(29))
    following = sequences.step([(0, 4), (1, 25)], with_host=False)
    for name in ("slot_mapping", "query_start", "context_len", "block_tables"):
        getattr(batch, name).data = getattr(following, name)
    sequences.compare(batch, sequences.qkv(29))


def test_plans_in_and_out_of_inference_mode():
    """What a wrapper keeps is made by whoever comes first and written by all."""
    sequences = started([Layer()])
    with torch.inference_mode():
        graph = Graph(sequences, 3, 8)
        batch = sequences.step([(0, 40), (1, 1)])
        sequences.compare(batch, sequences.qkv(41))
    with torch.no_grad():
        batch = sequences.step([(0, 1), (1, 7)])
        sequences.compare(batch, sequences.qkv(8))
        graph.inputs = [tuple(x.clone() for x in each) for each in graph.inputs]
        sequences.backend.prepare(graph.batch)
        sequences.run(graph.batch, graph.inputs)


def test_bf16():
    sequences = started([Layer(dim=64, options={"scale": 0.125})], torch.bfloat16)
    for step in STEPS:
        batch = sequences.step(step)
        sequences.compare(batch, sequences.qkv(batch.num_tokens), bound=2e-2)


def test_a_kind_is_planned_once_a_step():
    sequences = started([Layer(), Layer(options=WINDOW), Layer(), Layer(options=WINDOW)])
    prepared = sequences.step(STEPS[0])
    sequences.compare(prepared, sequences.qkv(prepared.num_tokens))  # tries the kinds
    fake.num_plans.clear()
    for step in STEPS[1:3]:
        batch = sequences.step(step)
        sequences.backend.prepare(batch)
        planned = len(fake.num_plans)
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
        assert len(fake.num_plans) == planned
    assert fake.num_plans == ["plan", "plan"] + ["plan", "prefill"] * 2


def test_blocks_that_a_window_hides_are_not_read():
    sequences = started([Layer(options=WINDOW), Layer(options=WINDOW)])
    inputs = sequences.rows([(0, 70), (1, 40)], reach=20)
    batch = sequences.batch(*inputs)
    sequences.compare(batch, sequences.qkv(batch.num_tokens))
    for slab in (sequences.slab, sequences.wanted):
        slab[0] = float("nan")
    for step in ([(0, 1), (1, 1)], [(0, 1), (1, 30)]):
        rows, slots = sequences.rows(step, reach=20)
        assert (rows.tables[0][0, :3] == 0).all()
        batch = sequences.batch(rows, slots)
        sequences.compare(batch, sequences.qkv(batch.num_tokens))


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
    sequences = started(LAYERS["groups of layers"])
    first = sequences.step(STEPS[0])
    sequences.compare(first, sequences.qkv(first.num_tokens))
    second = sequences.step(STEPS[1])
    third = sequences.step(STEPS[2])
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
        sequences.run(self.batch, self.inputs)
        sequences.backend.prepare(self.batch)
        fake.recording = []
        self.out = sequences.run(self.batch, self.inputs)
        self.kernels, fake.recording = fake.recording, None

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
        sequences.check(step, inputs, self.out, EXACT, len(counts))


def host_fields(rows: HostRows) -> tuple:
    return rows.query_start, rows.context_len, rows.tables


def keys_values(sequences: Sequences, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer, layout = sequences.layers[index], sequences.layout
    batch = AttentionBatch(sequences.slab, layout, *[torch.empty(0)] * 5, num_tokens=0)
    return tuple(
        flashinfer.region(batch, offset(index), layer.kv_heads, layer.dim)
        for offset in (layout.k_offset, layout.v_offset)
    )


@pytest.mark.parametrize("layers", list(LAYERS))
def test_captured_steps_read_only_what_prepare_puts_there(layers):
    sequences = started(LAYERS[layers])
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


@pytest.mark.parametrize("heads, kv_heads, rows", [(32, 8, 256), (32, 8, 600), (8, 8, 64), (40, 1, 100)])
def test_work_space_of_large_graphs(heads, kv_heads, rows):
    """fake_flashinfer refuses a work space that is too small for the plan."""
    kind = Kind(heads, kv_heads, 128, 1.0, None, None, 0)
    planner = Planner(Resources(fake, CPU, "fa3"), kind, torch.bfloat16, BLOCK)
    starts, lengths = np.arange(rows + 1, dtype=np.int32), np.ones(rows, np.int32)
    host = HostRows(starts, lengths, (np.zeros((rows, 1), np.int32),), graph=rows)
    planner.plan(host, 4)
    assert planner.is_planned(host)


def test_a_table_longer_than_its_graph_allows_is_an_error():
    sequences = started([Layer()])
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
    sequences = started([Layer(), layer])
    batch = sequences.step(STEPS[0])
    with pytest.warns(RuntimeWarning, match=f"4 heads, 2 KV heads of {layer.dim} .* FlashInfer {reason}"):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
    assert not sequences.backend.captures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = sequences.step(STEPS[1])
        sequences.compare(batch, sequences.qkv(batch.num_tokens))


def test_fp32_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(flashinfer, "DTYPES", (torch.bfloat16,))
    sequences = started([Layer()])
    batch = sequences.step(STEPS[0])
    with pytest.warns(RuntimeWarning, match="computes in bfloat16 and float16, not in torch.float32"):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))


def test_captures_is_about_the_layers_now_served():
    sequences = started([Layer(dim=24)])
    batch = sequences.step(STEPS[0])
    with pytest.warns(RuntimeWarning):
        sequences.compare(batch, sequences.qkv(batch.num_tokens))
    others = started([Layer()])
    others.backend = sequences.backend
    batch = others.step(STEPS[0])
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
    sequences = started([Layer()])
    batch = sequences.step(STEPS[1])
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


@pytest.mark.parametrize(
    "fields, wanted",
    [
        ({}, [(torch.float16, 64, 2, False, False)]),
        ({"dtype": "bfloat16"}, [(torch.bfloat16, 64, 2, False, False)]),
        ({"attention": "reference"}, []),
    ],
)
def test_builds_begin_with_the_loading(fields, wanted, monkeypatch):
    begun = []
    monkeypatch.setattr(flashinfer, "start_builds", lambda device, *shape: begun.append(shape))
    config = AutoConfig.for_model("llama", **COMMON | {"head_dim": 64, "dtype": "float16"})
    for device in (torch.device("cuda"), CPU):
        begin_builds(Settings(model="none", **fields), config, device)
    assert begun == wanted


def test_builds_that_cannot_begin_do_no_harm(monkeypatch, caplog):
    def fail(*shape):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(flashinfer, "start_builds", fail)
    config = AutoConfig.for_model("llama", **COMMON | {"dtype": "float16"})
    with caplog.at_level("INFO"):
        begin_builds(Settings(model="none"), config, torch.device("cuda"))
    assert "could not be built ahead: no compiler" in caplog.text


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
