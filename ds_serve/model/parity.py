"""A probe at load: does the paged model give the logits that the plain one gives?

Some models keep state that no flag tells of (recurrence, convolution), or hide a window in their mask. A
dozen tokens, once through transformers' eager attention and once paged in two chunks, show it before anyone
is served. Called by the loader.
"""

from __future__ import annotations

import torch
from torch import nn

from ds_serve.attention.backends import Backend
from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.attention.layout import KVLayout

# A token's largest difference of a logit, over the largest logit of all. In fp32 it is 1e-5 and less, so
# every token counts. In half precision rounding reaches 0.03, and now and then a token of a mixture of
# experts takes another expert, so the median token of the second chunk counts: lost state changes all.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.1

NUM_TOKENS = 13


def plain_logits(module: nn.Module) -> torch.Tensor:
    """Logits [NUM_TOKENS, V], fp32, of the probe by the attention that module has now."""
    with torch.inference_mode():
        return module(input_ids=_probe(module), use_cache=False).logits[0].float()


def verify_paged(module: nn.Module, wanted: torch.Tensor, layout: KVLayout, backend: Backend) -> None:
    """Compares module, with paged attention installed, with its plain_logits from before.

    Raises UnsupportedModelError with the difference where the two are not the same model.
    """
    ids, cut = _probe(module), NUM_TOKENS // 2
    slab = layout.allocate(-(-NUM_TOKENS // layout.block_size) + 1, ids.device)
    with torch.inference_mode():
        parts = [
            _chunk(module, ids, layout, slab, start, end) for start, end in ((0, cut), (cut, NUM_TOKENS))
        ]
    found = torch.cat(parts)[:, : wanted.shape[-1]]
    differences = (found - wanted).abs().amax(-1) / wanted.abs().max().clamp_min(1e-6)
    if module.dtype == torch.float32:
        difference, bound = differences.max().item(), TOLERANCE
    else:
        difference, bound = differences[cut:].median().item(), TOLERANCE_HALF
    if not difference <= bound:  # NaN is a failure too
        raise UnsupportedModelError(
            f"{type(module).__name__}: logits by paged attention ({backend.name}) differ from transformers' "
            f"by {difference:.2g} of the largest, above {bound:g}: the model keeps state that is not paged"
        )


def _probe(module: nn.Module) -> torch.Tensor:
    """int64[1, NUM_TOKENS]: random ids, the same at every call."""
    vocab = module.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocab, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(module.get_input_embeddings().weight.device)


def _chunk(module, ids, layout: KVLayout, slab: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Logits [end - start, V] of one sequence's positions start .. end - 1, in blocks from 1 on."""
    device = ids.device
    positions = torch.arange(start, end, device=device)
    blocks = -(-end // layout.block_size)
    batch = AttentionBatch(
        slab=slab,
        layout=layout,
        slot_mapping=positions + layout.block_size,
        query_start=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        context_len=torch.tensor([end], dtype=torch.int32, device=device),
        block_tables=torch.arange(1, blocks + 1, dtype=torch.int32, device=device)[None],
        positions=positions,
        max_query_len=end - start,
        num_tokens=end - start,
    )
    with use_batch(batch):
        out = module(input_ids=ids[:, start:end], position_ids=positions[None], use_cache=False)
    return out.logits[0].float()
