"""Paged attention in plain PyTorch: any device, any dtype, correct rather than fast.

The oracle of the other backends' tests and the fallback where none of them runs. Numerics follow
transformers' eager attention: scores in the input dtype, softmax in fp32, probabilities cast back.
Inside a region tokens lie as [block_size, heads, dim].
"""

from __future__ import annotations

import torch

from ds_serve.attention.context import AttentionBatch


def region(batch: AttentionBatch, offset: int, heads: int, dim: int) -> torch.Tensor:
    """View [num_blocks, block_size, heads, dim] of one layer's K or V in the slab."""
    size = batch.layout.block_size
    flat = batch.slab[:, offset : offset + size * heads * dim]
    return flat.unflatten(1, (size, heads, dim))


def first_visible(position: int, window: int | None, chunk: int | None) -> int:
    """The first position that a query at this one sees."""
    low = 0 if window is None else max(0, position - window + 1)
    return low if chunk is None else max(low, position // chunk * chunk)


def visible(
    query_len: int, context_len: int, window: int | None, chunk: int | None, device: torch.device
) -> torch.Tensor:
    """bool [query_len, context_len]: which keys the last query_len positions of a context may see."""
    i = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    j = torch.arange(context_len, device=device)[None, :]
    mask = j <= i
    if window is not None:
        mask &= j > i - window
    if chunk is not None:
        mask &= j // chunk == i // chunk
    return mask


class ReferenceBackend:
    """See backends.Backend for the contract."""

    name = "reference"
    captures = False
    reads_tables = True

    def prepare(self, batch: AttentionBatch) -> None:
        """There is nothing to plan."""

    @torch.no_grad()
    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        key_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layout = batch.layout
        v_dim = layout.layers[layer].v_dim
        if key_bias is not None:
            _check_bias(key_bias, batch, q.shape[1], softcap)
        keys = region(batch, layout.k_offset(layer), k.shape[1], k.shape[2])
        values = keys[..., :v_dim]
        if v is not None:
            values = region(batch, layout.v_offset(layer), k.shape[1], v_dim)
        slot_mapping, block_tables = batch.tables(layer)
        block, offset = slot_mapping // layout.block_size, slot_mapping % layout.block_size
        keys[block, offset] = k.to(keys.dtype)
        if v is not None:
            values[block, offset] = v.to(values.dtype)
        out = q.new_zeros(q.shape[0], q.shape[1], v_dim)
        rows = batch.host or batch  # a device would have to be waited for
        starts, lengths = rows.query_start.tolist(), rows.context_len.tolist()
        for row, length in enumerate(lengths):
            first, last = starts[row], starts[row + 1]
            if first == last:
                continue
            # From the first block on that a query sees: what is before may be gone.
            hidden = first_visible(length - (last - first), window, chunk) // layout.block_size
            table = block_tables[row, hidden : -(-length // layout.block_size)].long()
            hidden *= layout.block_size
            mask = visible(last - first, length, window, chunk, q.device)[:, hidden:]
            out[first:last] = attend(
                q[first:last],
                keys[table].flatten(0, 1)[: length - hidden].to(q.dtype),
                values[table].flatten(0, 1)[: length - hidden].to(q.dtype),
                mask,
                scale,
                softcap,
                sinks,
                None if key_bias is None else key_bias[:, hidden:length],
            )
        return out


def _check_bias(bias: torch.Tensor, batch: AttentionBatch, heads: int, softcap: float | None) -> None:
    longest = int((batch.host or batch).context_len.max())
    if softcap is not None:
        raise ValueError("key_bias: not together with softcap")
    if bias.dim() != 2 or len(bias) != heads or bias.dtype != torch.float32 or bias.shape[1] < longest:
        raise ValueError(
            f"key_bias: must be float32[{heads}, {longest} or more], got {bias.dtype}{list(bias.shape)}"
        )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention of one sequence. q [Q,H,Dk], k [C,Hk,Dk], v [C,Hk,Dv], mask [Q,C], key_bias [H,C]
    -> [Q,H,Dv]."""
    group = q.shape[1] // k.shape[1]
    keys = k.transpose(0, 1).repeat_interleave(group, 0)
    values = v.transpose(0, 1).repeat_interleave(group, 0)
    scores = torch.matmul(q.transpose(0, 1), keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float()
    if key_bias is not None:
        scores = scores + key_bias[:, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float().reshape(-1, 1, 1).expand(-1, scores.shape[1], 1)
        probs = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return torch.matmul(probs.to(v.dtype), values).transpose(0, 1)
