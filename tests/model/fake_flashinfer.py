"""Stands in for flashinfer 0.6.14 on a CPU: the names, arguments and state that FlashInferBackend uses.

It computes in plain PyTorch from what was planned. As in the original, a plan outside of graphs keeps copies
of its arrays; a wrapper of a captured graph keeps what it reads in the buffers it was given and in its int
work space, which must still be its own plan's when it runs; a captured run, kept in recording, has the
numbers of its capture and reads only those buffers when it is replayed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

NUM_SMS = 132
recording: list[Callable[[], None]] | None = None
num_plans: list[str] = []  # of each plan so far, which function made it
_stamps = itertools.count(1)


def _determine_attention_backend(
    device: Any,
    pos_encoding_mode: int,
    use_fp16_qk_reductions: bool,
    use_custom_mask: bool,
    dtype_q,
    dtype_kv,
) -> str:
    return "fa2"


utils = SimpleNamespace(determine_attention_backend=_determine_attention_backend)
built: list[str] = []


def _gen_batch_prefill_module(
    backend: str,
    dtype_q: torch.dtype,
    dtype_kv: torch.dtype,
    dtype_o: torch.dtype,
    dtype_idx: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    pos_encoding_mode: int,
    use_sliding_window: bool,
    use_logits_soft_cap: bool,
    use_fp16_qk_reduction: bool,
) -> SimpleNamespace:
    assert not use_fp16_qk_reduction
    return _spec(f"{backend} {head_dim_qk} window {use_sliding_window} cap {use_logits_soft_cap}")


def _gen_batch_decode_module(
    dtype_q: torch.dtype,
    dtype_kv: torch.dtype,
    dtype_o: torch.dtype,
    dtype_idx: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    pos_encoding_mode: int,
    use_sliding_window: bool,
    use_logits_soft_cap: bool,
) -> SimpleNamespace:
    return _spec(f"decode {head_dim_qk} window {use_sliding_window} cap {use_logits_soft_cap}")


def _spec(name: str) -> SimpleNamespace:
    def build(verbose: bool, need_lock: bool = True) -> None:
        built.append(name)

    return SimpleNamespace(name=name, is_aot=False, build=build)


jit = SimpleNamespace(
    gen_batch_prefill_module=_gen_batch_prefill_module, gen_batch_decode_module=_gen_batch_decode_module
)


class _Wrapper:
    """What both wrappers share."""

    def _open(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8
        self._floats = float_workspace_buffer
        self._ints = torch.zeros(8 << 20, dtype=torch.uint8)
        self._stamp = 0

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        self._floats, self._ints = float_workspace_buffer, int_workspace_buffer

    def _note(self, name, sizes, window_left, logits_soft_cap, sm_scale, dtypes) -> None:
        heads, kv_heads, dim, page_size = sizes
        assert heads % kv_heads == 0 and sm_scale is not None
        self._numbers = (*sizes, window_left, logits_soft_cap or 0.0, sm_scale)
        self._dtypes = dtypes
        self._stamp = next(_stamps)
        self._ints[:8].view(torch.int64)[0] = self._stamp
        num_plans.append(name)

    def _checked(self, q, cache, out) -> tuple:
        heads, kv_heads, dim, page_size = self._numbers[:4]
        keys, values = cache
        assert keys.stride() == values.stride() and keys.shape == values.shape
        assert keys.shape[1:] == (page_size, kv_heads, dim) and q.shape[1:] == (heads, dim)
        assert (q.dtype, keys.dtype) == self._dtypes and q.stride(-1) == keys.stride(-1) == 1
        assert out.shape == q.shape and out.is_contiguous() and out.dtype == q.dtype
        return keys, values

    def _own_plan(self) -> None:
        assert int(self._ints[:8].view(torch.int64)[0]) == self._stamp, "another plan is in the work space"


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        self._open(float_workspace_buffer, kv_layout)
        self._graph, self._tensor_cores = use_cuda_graph, use_tensor_cores
        self._buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._planned_once = False

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str | None = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> None:
        _check_pages(indptr, indices, last_page_len, page_size)
        if self._graph:
            assert len(last_page_len) == len(self._buffers[2]), "the batch size is fixed"
            for buffer, array in zip(self._buffers, (indptr, indices, last_page_len), strict=True):
                buffer[: len(array)].copy_(array)
        else:
            self._buffers = indptr.clone(), indices.clone(), last_page_len.clone()
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        self._check_floats(len(last_page_len), *sizes[:3])
        dtypes = q_data_type, kv_data_type or q_data_type
        self._note("plan", sizes, window_left, logits_soft_cap, sm_scale, dtypes)
        self._planned_once = True

    def _check_floats(self, rows: int, heads: int, kv_heads: int, dim: int) -> None:
        """What the plan of a captured graph takes of the work space, as scheduler.cuh counts it."""
        group = heads // kv_heads
        if not (self._graph and self._tensor_cores):
            assert group in (1, 2, 3, 4, 8) or self._tensor_cores, "no CUDA-core kernel for this group"
            return
        tile = 16 if group <= 16 else 64
        padded = max(2 * NUM_SMS // kv_heads, -(-rows * group // tile) + rows - 1)
        need = heads * padded * tile * 4 * (dim + 1)
        assert need <= len(self._floats), f"work space of {len(self._floats)} bytes, {need} are needed"

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> torch.Tensor:
        keys, values = self._checked(q, paged_kv_cache, out)
        numbers, (indptr, indices, last) = self._numbers, self._buffers
        assert len(q) == len(last)
        starts = torch.arange(len(q) + 1)

        def attend() -> None:
            self._own_plan()
            _attend(numbers, starts, indptr, indices, last, q, keys, values, out)

        if recording is not None:
            assert self._graph, "a wrapper without fixed buffers was captured"
            recording.append(attend)
        attend()
        return out


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: torch.dtype | str | None = None,
    kv_data_type: torch.dtype | str | None = None,
    data_type: torch.dtype | str | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """Of a graph's wrapper: whoever calls it has filled the buffers."""
    assert self._graph and self._planned_once and global_override_indptr_cpu is not None
    assert len(indices) <= len(self._buffers[1]) and len(last_page_len) == len(self._buffers[2])
    sizes = num_qo_heads, num_kv_heads, head_dim, page_size
    self._note("fast", sizes, window_left, logits_soft_cap, sm_scale, (q_data_type, kv_data_type))


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        assert not use_cuda_graph and backend in ("fa2", "fa3")
        self._open(float_workspace_buffer, kv_layout)
        self._kv_lens_buffer = torch.empty(32768, dtype=torch.int32)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        _check_pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert causal and qo_indptr[0] == 0 and len(qo_indptr) == len(paged_kv_indptr)
        lengths = paged_kv_indptr.diff() * page_size - page_size + paged_kv_last_page_len
        self._kv_lens_buffer[: len(lengths)].copy_(lengths)
        arrays = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._arrays = [array.clone() for array in arrays]
        sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        dtypes = q_data_type, kv_data_type or q_data_type
        self._note("prefill", sizes, window_left, logits_soft_cap, sm_scale, dtypes)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
    ) -> torch.Tensor:
        assert recording is None, "a prefill was captured"
        keys, values = self._checked(q, paged_kv_cache, out)
        assert len(q) == self._arrays[0][-1]
        self._own_plan()
        _attend(self._numbers, *self._arrays, q, keys, values, out)
        return out


def _check_pages(indptr, indices, last_page_len, page_size) -> None:
    for array in (indptr, indices, last_page_len):
        assert array.dtype == torch.int32 and array.dim() == 1
    assert indptr[0] == 0 and indptr[-1] == len(indices) and len(indptr) == len(last_page_len) + 1
    assert (indptr.diff() > 0).all() and ((1 <= last_page_len) & (last_page_len <= page_size)).all()


def _attend(numbers, starts, indptr, indices, last, q, keys, values, out) -> None:
    """Causal from the end of each row's context, a window that counts the keys left of the query's own."""
    heads, kv_heads, dim, page_size, window_left, soft_cap, scale = numbers
    for row in range(len(last)):
        pages = indices[indptr[row] : indptr[row + 1]].long()
        length = (len(pages) - 1) * page_size + int(last[row])
        query = q[starts[row] : starts[row + 1]].float()
        k, v = (
            cache[pages].flatten(0, 1)[:length].float().repeat_interleave(heads // kv_heads, 1)
            for cache in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", query, k) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        i = torch.arange(length - len(query), length)[:, None]
        j = torch.arange(length)[None]
        seen = (j <= i) & ((window_left < 0) | (j >= i - window_left))
        probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[starts[row] : starts[row + 1]] = torch.einsum("hqk,khd->qhd", probs, v).to(out.dtype)
