"""A probe at load: does the paged stage give the results that the plain one gives?

Some models keep state that no flag tells of (recurrence, convolution), or hide a window in their mask. A
dozen tokens, once through transformers' eager attention and once paged in two chunks, show it before anyone
is served. A stage after the first gets random hidden states. All tensor shards of a stage run it together.
Called by the loader.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ds_serve.attention.backends import Backend
from ds_serve.attention.context import AdapterRows, AttentionBatch, use_batch
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.attention.layout import KVLayout
from ds_serve.model.quantised import rounds_activations
from ds_serve.model.stage import Stage

# A token's largest difference of an output, over the largest output of all. In fp32 it is 1e-5 and less, so
# every token counts. In half precision rounding reaches 0.03, so the median token of the second chunk counts:
# lost state changes all. The same where activations are quantised: a last bit decides between two steps of 8
# bits. With experts more than half of the tokens may take another one than before: a quarter must be right.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.1

_EXPERTS = frozenset({"experts", "router", "block_sparse_moe"})

NUM_TOKENS = 13


def has_experts(module: nn.Module) -> bool:
    """Whether tokens choose among parts of a layer."""
    return any(name.rpartition(".")[2] in _EXPERTS for name, _ in module.named_modules())


@dataclass
class Probe:
    """T tokens of a sequence: ids int64[1, T], positions int64[T]; after the first stage hidden [1, T, H]."""

    ids: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor | None

    @classmethod
    def of(cls, stage: Stage, device: torch.device, num_tokens: int = NUM_TOKENS) -> Probe:
        """Random, the same at every call and on every shard."""
        generator = torch.Generator().manual_seed(0)
        vocab = stage.module.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, vocab, (1, num_tokens), generator=generator)
        hidden = torch.randn(1, num_tokens, stage.hidden_size, generator=generator)
        first = stage.place.is_first_stage
        positions = torch.arange(num_tokens, device=device)
        return cls(ids.to(device), positions, None if first else hidden.to(device, stage.dtype))

    def run(self, stage: Stage, start: int = 0, end: int = NUM_TOKENS) -> torch.Tensor:
        """The stage's output for positions start .. end - 1: [end - start, V or H]."""
        positions = self.positions[start:end]
        hidden = None if self.hidden is None else self.hidden[:, start:end]
        out = stage(self.ids[:, start:end], positions, positions - start, hidden)
        return out if stage.place.is_last_stage else out[0]


def plain_output(stage: Stage, device: torch.device) -> torch.Tensor:
    """The probe's logits [NUM_TOKENS, V], or hidden states, by the attention that the stage has now.

    UnsupportedModelError where a stage is not a function of its tokens and of one hidden state each.
    """
    who = f"{type(stage.module).__name__}, {stage.place}"
    try:
        with torch.inference_mode():
            out = Probe.of(stage, device).run(stage)
    except Exception as error:
        if stage.place.is_first_stage:
            raise
        raise UnsupportedModelError(
            f"{who}: fails on hidden states alone, use pipeline_parallel=1: {error}"
        ) from error
    if not stage.place.is_last_stage and (out.shape[1:], out.dtype) != ((stage.hidden_size,), stage.dtype):
        raise UnsupportedModelError(
            f"{who}: hands on {tuple(out.shape[1:])} of {out.dtype} for each token, where stages send "
            f"{stage.hidden_size} of {stage.dtype}; use pipeline_parallel=1"
        )
    if not stage.place.is_first_stage and not out.isfinite().all():
        raise UnsupportedModelError(
            f"{who}: random hidden states give no finite numbers: its layers read the token embeddings "
            f"besides, or {stage.dtype} is too narrow; use pipeline_parallel=1"
        )
    return out


def verify_paged(stage: Stage, wanted: torch.Tensor, layout: KVLayout, backend: Backend) -> None:
    """Compares stage, with paged attention installed, with its plain_output from before.

    Raises UnsupportedModelError with the difference where the two are not the same model.
    """
    probe, cut = Probe.of(stage, wanted.device), NUM_TOKENS // 2
    slab = layout.allocate(-(-NUM_TOKENS // layout.block_size) + 1, wanted.device)
    parts = []
    for start, end in ((0, cut), (cut, NUM_TOKENS)):
        with torch.inference_mode(), use_batch(chunk(layout, slab, start, end)):
            parts.append(probe.run(stage, start, end))
    wanted, found = wanted.float(), torch.cat(parts).float()
    differences = (found - wanted).abs().amax(-1) / wanted.abs().max().clamp_min(1e-6)
    if stage.dtype == torch.float32 and not rounds_activations(stage.module.config):
        difference, bound = differences.max().item(), TOLERANCE
    else:
        share = 0.25 if has_experts(stage.module) else 0.5
        difference, bound = differences[cut:].quantile(share).item(), TOLERANCE_HALF
    if not difference <= bound:  # NaN is a failure too
        raise UnsupportedModelError(
            f"{type(stage.module).__name__}: results by paged attention ({backend.name}) differ from "
            f"transformers' by {difference:.2g} of the largest, above {bound:g}: the model keeps state that "
            "is not paged"
        )


def try_adapters(stage: Stage, count: int, layout: KVLayout, device: torch.device) -> None:
    """A forward whose tokens take adapters 0 .. count in turn: what cannot work fails here, before a request.

    UnsupportedModelError where the output is not finite.
    """
    slab = layout.allocate(-(-NUM_TOKENS // layout.block_size) + 1, device)
    batch = chunk(layout, slab, 0, NUM_TOKENS)
    batch.adapters = AdapterRows(batch.positions % (count + 1), 1, count)
    with torch.inference_mode(), use_batch(batch):
        out = Probe.of(stage, device).run(stage)
    if not out.isfinite().all():
        raise UnsupportedModelError(
            f"{type(stage.module).__name__}, {stage.place}: adapters give numbers that are not finite"
        )


def chunk(layout: KVLayout, slab: torch.Tensor, start: int, end: int) -> AttentionBatch:
    """One sequence's positions start .. end - 1, in blocks from 1 on."""
    device = slab.device
    positions = torch.arange(start, end, device=device)
    blocks = -(-end // layout.block_size)
    return AttentionBatch(
        slab=slab,
        layout=layout,
        slot_mapping=positions + layout.block_size,
        query_start=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        context_len=torch.tensor([end], dtype=torch.int32, device=device),
        block_tables=torch.arange(1, blocks + 1, dtype=torch.int32, device=device)[None],
        positions=positions,
        num_tokens=end - start,
    )
