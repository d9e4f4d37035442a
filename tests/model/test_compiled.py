"""Compiled layers: the tokens of generate, how many graphs and products there are, and what is left out.

Graphs that the compiler has traced run as traced here, which takes seconds; inductor itself in make test-all.
More models are in tests/ranks/test_compiled_ranks.py.
"""

from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch
from architectures import SERVED, is_known, tiny
from tiny_models import build, mixed_prompts, oracles, run_all, save
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import PreTrainedModel

from ds_serve.attention import opaque
from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.model import compiled
from ds_serve.model.certificate import COMPILED
from ds_serve.model.compiled import compile_layers
from ds_serve.model.loader import load
from ds_serve.model.merged import MergedLinear, SiblingLinear, merge, one_product
from ds_serve.model.parity import Probe, chunk
from ds_serve.model.report import InjectionReport

ALL = os.environ.get("DS_SERVE_TEST_ALL") == "1"
NUM_REQUESTS = 16
LENGTHS = [4 + (7 * index) % 17 for index in range(NUM_REQUESTS)]
PROMPTS = mixed_prompts(NUM_REQUESTS)
# Layers that differ in more than their weights: windows and rope of gemma3, first layers without experts.
KINDS = {"deepseek_v3": 2}
MORE = {
    "llama": 1, "gemma3_text": 2, "qwen3": 1, "phi3": 1, "mixtral": 1, "llama4_text": 4, "gpt_oss": 2,
    "bloom": 1, "falcon_7b": 1,
}  # fmt: skip


def as_traced(traced, inputs):
    return traced.forward


@pytest.fixture
def backends(monkeypatch):
    """The compiler's backends of models that the test loads; they run graphs as traced."""
    made = []

    class Backend(compiled._Backend):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(compiled, "_Backend", Backend)
    monkeypatch.setattr(compiled, "compiler", as_traced)
    return made


def serve(engine_of, model, folder, **settings):
    """(engine, whether it gives generate's tokens)"""
    engine = engine_of(**{"model": save(model, folder), "num_blocks": 600, "compile": "on"} | settings)
    return engine, run_all(engine, PROMPTS, LENGTHS) == oracles(model, PROMPTS, LENGTHS)


def loaded(model, folder, **settings):
    return load(Settings(**{"model": save(model, folder), "compile": "on"} | settings))


def reasons(model) -> set[str]:
    layers = {name: why for name, why in model.injection.choices.items() if name.startswith("layer")}
    return set(layers.values())


@pytest.mark.parametrize("name", [*KINDS, *(MORE if ALL else ())])
def test_tokens_of_generate_and_nothing_to_compile_in_service(
    name, engine_of, backends, tmp_path, monkeypatch
):
    reports = []
    monkeypatch.setattr(
        "ds_serve.model.loader.compile_layers",
        lambda stage, layout, grid, report, mode: (
            reports.append(report), compile_layers(stage, layout, grid, report, mode)
        ),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, same = serve(engine_of, tiny(name), tmp_path)
    assert same
    [report], [backend] = reports, backends
    assert report.compiled == 4 and report.max_error < 1e-5
    assert backend.num_graphs <= 2 * (KINDS | MORE)[name]
    assert backend.num_late == 0


@pytest.mark.skipif(not ALL, reason="minutes")
@pytest.mark.parametrize("name", [name for name in SERVED if is_known(name)])
def test_every_architecture_gives_its_tokens(name, engine_of, backends, tmp_path):
    """Whole layers or not: what the compiler cannot take stays as it was."""
    torch._dynamo.reset()
    _, same = serve(engine_of, tiny(name), tmp_path, max_model_len=256)
    assert same and not any(backend.num_late for backend in backends)


def step(model, start, end, device="cpu"):
    """The stage's output for a step of the tokens start .. end - 1 of a probe, after those before it."""
    slab = model.layout.allocate(8, device)
    probe = Probe.of(model.stage, device, end)
    with torch.inference_mode():
        for span in ((0, start), (start, end)):
            if span[0] < span[1]:
                with use_batch(chunk(model.layout, slab, *span)):
                    out = probe.run(model.stage, *span)
    return out


def test_one_code_serves_all_layers_and_sizes(backends, tmp_path):
    source = build("llama", num_hidden_layers=6)
    model, plain = loaded(source, tmp_path), loaded(source, tmp_path, compile="off")
    assert backends[0].num_graphs == 2  # one token, and any other number of them
    for start, end in ((0, 1), (0, 2), (3, 5), (5, 6), (0, 40), (1, 100)):
        torch.testing.assert_close(step(model, start, end), step(plain, start, end), atol=2e-5, rtol=1e-5)
    before = torch.arange(64)  # as static tensors of CUDA graphs are made, and as parts of an upload lie
    for positions in (before[:6], before[0:1], before[7:9], before[3:4]):
        start, end = int(positions[0]), int(positions[-1]) + 1
        batch = chunk(model.layout, model.layout.allocate(8, "cpu"), start, end)
        with torch.inference_mode(), use_batch(batch):
            model.stage(positions[None] % 7, positions, positions - start, None)
    assert (backends[0].num_graphs, backends[0].num_late) == (2, 0)


@pytest.mark.parametrize("biases", [False, True] if ALL else [True])
def test_siblings_are_one_product(biases, monkeypatch, tmp_path):
    """Four products a layer, as in a hand-written one: q|k|v, o, gate|up, down."""
    products = []

    def counting(graph, inputs):
        ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        products.append(sum(op.startswith(("aten.mm", "aten.addmm")) for op in ops))
        return graph.forward

    monkeypatch.setattr(compiled, "compiler", aot_autograd(fw_compiler=counting))
    model = loaded(build("llama", num_hidden_layers=1, attention_bias=biases, mlp_bias=biases), tmp_path)
    assert reasons(model) == {COMPILED}
    assert products == [4, 4]


def test_no_weight_is_held_twice(backends, tmp_path):
    source = build("llama", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    model = loaded(source, tmp_path)

    def size(module):
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in module.parameters()
        }
        return sum(each.nbytes() for each in storages.values())

    assert size(model.stage.module) == size(source)
    attention = model.stage.module.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        own, original = attention.get_submodule(name), source.model.layers[0].self_attn.get_submodule(name)
        assert torch.equal(own.weight, original.weight) and torch.equal(own.bias, original.bias)


# -- what is left out --------------------------------------------------------------------------


def test_a_layer_that_differs_stays(backends, engine_of, tmp_path, monkeypatch):
    def wrong(traced, inputs):
        return lambda *args: tuple(each * 1.01 for each in traced.forward(*args))

    monkeypatch.setattr(compiled, "compiler", wrong)
    with pytest.warns(RuntimeWarning, match="LlamaDecoderLayer is not compiled: its relative error is 0.0"):
        _, same = serve(engine_of, build("llama", num_hidden_layers=1), tmp_path)
    assert same


def test_a_number_that_is_none_is_a_difference(backends, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compiled, "compiler", lambda traced, _: lambda *a: tuple(x * torch.nan for x in traced.forward(*a))
    )
    with pytest.warns(RuntimeWarning, match="nan"):
        model = loaded(build("llama", num_hidden_layers=1), tmp_path)
    assert model.injection.compiled == 0 and "above 0.0001" in reasons(model).pop()


def test_a_compiler_that_fails_leaves_the_model_as_it_was(backends, engine_of, tmp_path, monkeypatch):
    def fail(traced, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "compiler", fail)
    with pytest.warns(RuntimeWarning, match="no such instruction") as warned:
        _, same = serve(engine_of, build("llama", num_hidden_layers=2), tmp_path)
    assert same and backends[0].num_graphs == 1  # the other layers are of the same kind
    assert len([each for each in warned if "not compiled" in str(each.message)]) == 1


def test_an_option_that_inductor_does_not_know_leaves_layers_as_they_are(backends, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "compiler", compiled.inductor)
    monkeypatch.setitem(compiled.OPTIONS, "cpu", {"one": {"no_such": 1}, "many": {"no_such": 1}})
    with pytest.warns(RuntimeWarning, match="no_such"):
        model = loaded(build("llama", num_hidden_layers=1), tmp_path)
    assert model.injection.compiled == 0 and step(model, 0, 5).isfinite().all()


def test_where_one_product_cannot_be_compiled_there_are_several(backends, tmp_path, monkeypatch):
    def fail_merged(traced, inputs):
        products = [node for node in traced.graph.nodes if node.target is F.linear]
        if len(products) == 4:
            raise RuntimeError("a view of a slice")
        return traced.forward

    monkeypatch.setattr(compiled, "compiler", fail_merged)
    assert reasons(loaded(build("llama", num_hidden_layers=1), tmp_path)) == {COMPILED}


def test_experts_in_a_loop_stay_as_they_are(backends, engine_of, tmp_path, monkeypatch):
    """transformers' own loop over experts asks which are hit; its grouped products do not."""
    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", lambda *_: "eager")
    with pytest.warns(RuntimeWarning, match="MixtralDecoderLayer is not compiled: "):
        engine, same = serve(engine_of, build("mixtral", num_hidden_layers=1, num_local_experts=4), tmp_path)
    assert same


def test_layers_with_adapters_or_a_forward_of_their_own_stay(backends, tmp_path):
    model = loaded(build("llama"), tmp_path, compile="off")
    layers = model.stage.module.model.layers
    layers[1].forward = layers[1].forward
    layers[2].self_attn.q_proj = compiled.LinearWithAdapters.__new__(compiled.LinearWithAdapters)
    nn.Module.__init__(layers[2].self_attn.q_proj)
    assert compiled._unfit(layers[0], [object()]) is None
    assert compiled._unfit(layers[0], []) == "the model did not call it"
    assert compiled._unfit(layers[1], [object()]) == "it has a forward of its own"
    assert compiled._unfit(layers[2], [object()]) == "it has LoRA adapters"


def test_what_comes_too_late_runs_as_traced(backends, tmp_path):
    source = build("llama", num_hidden_layers=2)
    models = [loaded(source, tmp_path, compile=mode) for mode in ("on", "off")]
    for model in models:
        model.stage.module.model.layers[1].mlp.act_fn = nn.GELU()
    late, plain = (step(model, 0, 5) for model in models)
    torch.testing.assert_close(late, plain, atol=2e-5, rtol=1e-5)
    assert (backends[0].num_graphs, backends[0].num_late) == (2, 1)


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_nothing_is_compiled_on_a_cpu_unless_asked_for(mode, backends, tmp_path):
    model = loaded(build("llama"), tmp_path, compile=mode)
    assert backends == [] and COMPILED not in reasons(model)
    assert type(model.stage.module.model.layers[0].self_attn.q_proj).__name__ == "Linear"


def test_the_report_counts_each_module_once():
    report = InjectionReport()
    report.keep("of no known family", "layer 0", "layer 1", "norm")
    report.compile("layer 0", 0.1)
    report.explain("layer 1", "not compiled: why")
    assert (report.compiled, report.kept, report.max_error) == (1, 2, 0.1)
    assert report.reasons == {"of no known family": 1, "not compiled: why": 1}
    report.explain("layer 0", "not compiled: why")
    assert (report.compiled, report.kept, report.reasons["not compiled: why"]) == (0, 3, 2)


# -- merging -----------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, same_input: bool = True, biases: tuple[bool, ...] = (True, False, True)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(8, size, bias=bias) for size, bias in zip((6, 4, 2), biases, strict=True)
        )
        self.same_input = same_input

    def forward(self, x):
        k = self.k_proj(x if self.same_input else x * 2)
        out = x.new_empty(*x.shape[:-1], 12)
        out[..., :6].copy_(self.q_proj(x))  # whose result nobody reads
        out[..., 6:].copy_(torch.cat([k, self.v_proj(x)], -1))
        return out


@pytest.mark.parametrize("same_input,fewer", [(True, 2), (False, 0)])
def test_products_of_one_input_become_one(same_input, fewer):
    layer, x, found = Layer(same_input).requires_grad_(False), torch.randn(3, 8), []
    wanted = layer(x)
    assert merge(layer) == 1
    assert torch.equal(layer(x), wanted)

    def backend(traced, inputs):
        found.append(one_product(traced))
        return traced.forward

    with torch.no_grad():
        got = torch.compile(layer.forward, backend=backend, fullgraph=True)(x)
    assert found == [fewer]
    torch.testing.assert_close(got, wanted)


def test_what_is_no_plain_linear_is_not_merged():
    hooked, narrow, quantised, alone = Layer(), Layer(), Layer(), Layer()
    hooked.k_proj.register_forward_hook(lambda *_: None)
    narrow.v_proj = nn.Linear(4, 2)
    quantised.q_proj.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
    del alone.k_proj
    for layer in (hooked, narrow, quantised, alone):
        assert merge(layer) == 0
    assert not [each for each in hooked.modules() if isinstance(each, MergedLinear | SiblingLinear)]


def test_numbers_of_what_ops_use_are_free_again():
    class Thing:
        pass

    first, second = Thing(), Thing()
    numbers = opaque.number_of(first), opaque.number_of(second)
    assert opaque.number_of(first) == numbers[0] != numbers[1]
    del first
    assert opaque.number_of(Thing()) == numbers[0]


# -- inductor ----------------------------------------------------------------------------------


@pytest.mark.skipif(not ALL, reason="half a minute of g++")
def test_inductor_gives_the_same_and_its_cache_serves_a_second_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    source = build("llama", num_hidden_layers=1)
    outputs, counts = [], []
    for mode in ("on", "on", "off"):
        torch._dynamo.reset()
        counters.clear()
        model = loaded(source, tmp_path / "model", compile=mode)
        assert (reasons(model) == {COMPILED}) == (mode == "on")
        outputs.append(torch.cat([step(model, 0, 1), step(model, 0, 20), step(model, 9, 30)]))
        counts.append({name: count for name, count in counters["inductor"].items() if "fxgraph" in name})
        del model
        gc.collect()  # the numbers of its backend are free again, as at a new start
    assert counts == [{"fxgraph_cache_miss": 2}, {"fxgraph_cache_hit": 2}, {}]
    for compiled_output in outputs[:2]:
        torch.testing.assert_close(compiled_output, outputs[2], atol=2e-5, rtol=1e-5)
