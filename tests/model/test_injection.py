"""Fused CPU layers against transformers' own modules: logits, refusals, and the packed product itself."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ds_serve.attention.backends import select_backend
from ds_serve.attention.builder import load_ops
from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import install, probe_layers
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.model import fused_cpu
from ds_serve.model.injection import inject

OPS = torch.ops.ds_serve
pytestmark = pytest.mark.skipif(
    load_ops() is None or not OPS.has_avx512_bf16(), reason="needs a compiler and AVX512-BF16"
)
BLOCK = 16
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 203,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama_biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral_window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=7)),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**{**SIZES, "head_dim": 64}, tie_word_embeddings=True)),
}


def build(name):
    """(original, copy to inject, backend): random bf16 weights, biases and norms away from 0 and 1."""
    cls, config = MODELS[name]
    torch.manual_seed(1)
    model = cls(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.3)
    model = model.bfloat16()
    backend = select_backend("cpu", torch.bfloat16, BLOCK)
    other = copy.deepcopy(model)
    for m in (model, other):
        install(m, backend)
    return model, other, backend


class Paged:
    """Steps of ragged batches through one model: rows are (sequence, new token ids)."""

    def __init__(self, model, blocks=4):
        config = model.config
        kv = LayerKV(config.num_key_value_heads, config.head_dim, config.head_dim)
        self.model, self.blocks = model, blocks
        self.layout = KVLayout((kv,) * config.num_hidden_layers, block_size=BLOCK)
        self.slab = self.layout.allocate(blocks * 8, "cpu")
        self.length = {}

    def step(self, rows, sampled=None):
        positions, slots, starts, ends = [], [], [0], []
        for seq, ids in rows:
            first = self.length.get(seq, 0)
            at = range(first, first + len(ids))
            positions += at
            slots += [(seq * self.blocks + p // BLOCK) * BLOCK + p % BLOCK for p in at]
            starts.append(len(positions))
            ends.append(first + len(ids))
            self.length[seq] = ends[-1]
        tables = [[seq * self.blocks + b for b in range(self.blocks)] for seq, _ in rows]
        batch = AttentionBatch(
            self.slab,
            self.layout,
            torch.tensor(slots),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(ends, dtype=torch.int32),
            torch.tensor(tables, dtype=torch.int32),
            torch.tensor(positions),
            len(positions),
            sampled,
        )
        ids = torch.tensor([[t for _, r in rows for t in r]])
        with torch.inference_mode(), use_batch(batch):
            return (
                self.model(input_ids=ids, position_ids=batch.positions[None], use_cache=False)
                .logits[0]
                .float()
            )


def steps():
    """Prefills of several lengths, a chunked one, decodes of several rows, and prefill mixed with decode."""
    g = torch.Generator().manual_seed(2)

    def ids(n):
        return torch.randint(0, 203, (n,), generator=g).tolist()

    yield [(0, ids(1))]
    yield [(1, ids(40))]
    yield [(2, ids(13)), (3, ids(30)), (4, ids(5))]
    yield [(2, ids(19)), (0, ids(1)), (3, ids(1))]
    yield [(seq, ids(1)) for seq in range(5)]
    yield [(seq, ids(1)) for seq in (4, 1)] + [(5, ids(50))]


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_the_last_layer_finishes_sampled_tokens_only():
    _, model, backend = build("qwen3")
    inject(model, backend)
    everything, some = Paged(model), Paged(model)
    for rows in steps():
        wanted = everything.step(rows)
        last = torch.tensor([len(ids) for _, ids in rows]).cumsum(0) - 1
        got = some.step(rows, last)
        assert relative(got[last], wanted[last]) < 1e-6, rows
        assert len(last) == len(wanted) or relative(got, wanted) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_original_models(name):
    original, injected, backend = build(name)
    report = inject(injected, backend)
    assert (report.injected, report.kept, report.reasons) == (5, 0, {})
    assert 0 <= report.max_error < 0.01
    assert type(injected.model.layers[1]) is fused_cpu.FusedDecoderLayer
    a, b = Paged(original), Paged(injected)
    for rows in steps():
        wanted, got = a.step(rows), b.step(rows)
        # bf16 logits of three layers: both differ from the exact ones by rounding, 2^-9 a step
        assert relative(got, wanted) < 0.015, rows
        assert relative(got.roll(1, -1), wanted) > 0.5


@pytest.mark.parametrize("name", ["llama_biases", "qwen3"])
def test_shards_sum_to_the_whole_layer(name):
    """Two halves of heads and of the MLP, with `reduce` adding the other half's output."""
    _, model, backend = build(name)
    whole = model.model.layers[0]
    d, hidden = whole.self_attn.head_dim, model.config.hidden_size
    x = torch.randn(1, 5, hidden).bfloat16()
    positions = torch.arange(5)[None]
    rotary = model.model.rotary_emb(x, positions)
    wanted_layer = fused_cpu.FusedDecoderLayer(whole, backend, None)

    def half(rank):
        layer = copy.deepcopy(whole)
        a, m = layer.self_attn, layer.mlp
        cut = {
            a.q_proj: 0,
            a.k_proj: 0,
            a.v_proj: 0,
            m.gate_proj: 0,
            m.up_proj: 0,
            a.o_proj: 1,
            m.down_proj: 1,
        }
        for linear, dim in cut.items():
            linear.weight.data = linear.weight.data.chunk(2, dim)[rank].contiguous()
            if dim == 0 and linear.bias is not None:
                linear.bias.data = linear.bias.data.chunk(2)[rank].contiguous()
        for linear in cut:
            linear.out_features, linear.in_features = linear.weight.shape
        return layer

    def batch(heads):
        layout = KVLayout((LayerKV(heads, d, d),))
        i32 = {"dtype": torch.int32}
        ends, table = torch.tensor([5], **i32), torch.zeros(1, 1, **i32)
        start = torch.tensor([0, 5], **i32)
        return AttentionBatch(
            layout.allocate(1, "cpu"), layout, torch.arange(5), start, ends, table, positions[0], 5
        )

    with torch.no_grad():
        with use_batch(batch(2)):
            wanted = wanted_layer(x, position_embeddings=rotary)
        got = _two_ranks(half(0), half(1), backend, batch, x, rotary)
    assert relative((got - x).float(), (wanted - x).float()) < 0.02


def _two_ranks(first, second, backend, batch, x, rotary):
    """Runs both shards in step, in two threads, adding their parts where they meet."""
    import threading
    from contextvars import copy_context

    meet, parts, out = threading.Barrier(2), [None, None], [None, None]

    def reduce_of(rank):
        def reduce(t):
            parts[rank] = t.clone()
            meet.wait(20)
            t.copy_(parts[0] + parts[1])
            meet.wait(20)

        return reduce

    def run(rank, layer):
        fused = fused_cpu.FusedDecoderLayer(layer, backend, None, reduce=reduce_of(rank))
        with torch.no_grad(), use_batch(batch(1)):
            out[rank] = fused(x, position_embeddings=rotary)

    threads = [
        threading.Thread(target=copy_context().run, args=(run, rank, layer))
        for rank, layer in enumerate((first, second))
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert torch.equal(out[0], out[1])
    return out[0]


@settings(max_examples=60, deadline=None)
@given(
    m=st.one_of(st.integers(1, 40), st.integers(90, 210)),
    n=st.integers(1, 150),
    k=st.integers(1, 160),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_packed_product_is_the_product(m, n, k, bias, seed):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=g).bfloat16() for shape in ((m, k), (n, k), (n,)))
    packed = fused_cpu.pack(w)
    assert torch.equal(fused_cpu.unpack(packed, n, k), w)
    wanted = x.double() @ w.double().T + (b.double() if bias else 0)
    got = OPS.linear_packed(x, packed, n, b if bias else None).double()
    # one rounding to bf16 of a sum of k products in fp32
    bound = wanted.abs() * 2**-8 + 1e-6 * (x.double().abs() @ w.double().abs().T) + 1e-6
    assert ((got - wanted).abs() <= bound).all()


def test_a_broken_pack_is_left_out(monkeypatch):
    original, model, backend = build("llama")
    true_pack, calls = fused_cpu.pack, []

    def broken(weight):
        packed = true_pack(weight)
        calls.append(1)
        if len(calls) == 6:  # the second layer's o_proj: one panel of three
            packed[1] = packed[1].flip(1)
        return packed

    monkeypatch.setattr(fused_cpu, "pack", broken)
    with pytest.warns(RuntimeWarning, match="LlamaDecoderLayer 1: the fused module's relative error"):
        report = inject(model, backend)
    assert (report.injected, report.kept) == (4, 1)
    assert report.reasons == {"result differs from the original's": 1}
    assert [type(layer).__name__ for layer in model.model.layers] == [
        "FusedDecoderLayer",
        "LlamaDecoderLayer",
        "FusedDecoderLayer",
    ]
    rows = [(0, [3, 1, 4, 1, 5])]
    assert relative(Paged(model).step(rows), Paged(original).step(rows)) < 0.015


def test_what_does_not_match_stays(recwarn):
    _, model, backend = build("llama")
    a, b, c = model.model.layers
    a.mlp.act_fn = torch.nn.GELU()
    b.self_attn.q_proj.register_forward_hook(lambda *args: None)
    c.mlp.down_proj = torch.nn.Sequential(c.mlp.down_proj)
    report = inject(model, backend)
    assert report.reasons == {"activation GELU": 1, "Linear has hooks": 1, "linear of class Sequential": 1}
    assert (report.injected, report.kept) == (2, 3)
    assert list(model.model.layers) == [a, b, c]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_unknown_models_dtypes_and_off():
    backend = select_backend("cpu", torch.bfloat16, BLOCK)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=50)).bfloat16().eval()
    before = [type(m) for m in gpt2.modules()]
    report = inject(gpt2, backend)
    assert report.injected == 0 and report.reasons == {"GPT2LMHeadModel is of no known family": 0}
    assert [type(m) for m in gpt2.modules()] == before
    _, model, backend = build("llama")
    assert inject(model, backend, mode="off").reasons == {"mode is off": 5}
    assert inject(model.float(), backend).injected == 0
    with pytest.raises(ValueError, match="mode"):
        inject(model, backend, mode="on")


def test_no_second_copy_of_the_weights():
    """The injected model's parameters take what the original's took, up to panels filled with zeros."""
    original, model, backend = build("llama")
    inject(model, backend)

    def size(m):
        return sum(p.numel() for p in m.parameters())

    assert size(original) <= size(model) < 1.05 * size(original)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.packed is head.packed
    assert torch.equal(embedding.weight, original.get_input_embeddings().weight)


def test_fused_layers_answer_the_shape_probe_and_refuse_a_cache():
    _, model, backend = build("qwen3")
    inject(model, backend)
    assert probe_layers(model) == [LayerKV(2, 64, 64)] * 3
    with pytest.raises(ValueError, match="use_cache"):
        model(input_ids=torch.tensor([[1]]), use_cache=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: OPS.linear_packed(x, w, 65, None),
        lambda x, w: OPS.linear_packed(x.float(), w, 64, None),
        lambda x, w: OPS.linear_packed(x[:, ::2], w, 64, None),
        lambda x, w: OPS.linear_packed(x, w, 64, torch.zeros(63).bfloat16()),
    ],
)
def test_the_product_refuses_what_does_not_fit(call):
    x, w = torch.zeros(3, 32).bfloat16(), fused_cpu.pack(torch.zeros(64, 32).bfloat16())
    with warnings.catch_warnings(), pytest.raises(ValueError):
        call(x, w)


def test_embedding_refuses_ids_out_of_range():
    w = fused_cpu.pack(torch.zeros(50, 32).bfloat16())
    with pytest.raises(IndexError, match="between 0 and 49"):
        OPS.embedding_packed(torch.tensor([50]), w, 50, 32)
