"""Started on every rank: cuts each case's model into tensor shards, compares logits with the whole model's.

    sharding_run.py CASE...

Rank 0 prints a JSON line a case: {"case", "difference" (the largest of any logit), "argmax" (whether all are
the same), "whole" (the model's parameters), "uncut" (those that each shard may have in full), "shards" (the
parameters of each), "latents" (the layers of each whose attention was compared with latents in the cache
too), "left_behind" (whether DeepSpeed's class is changed afterwards), "error"}. Cases of FUSED have other
fields: see run_fused.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback

import torch
import torch.distributed
from deepspeed.inference.config import DeepSpeedInferenceConfig
from sharding_cases import CASES, FUSED, Case
from tiny_models import VOCAB, build

from ds_serve.attention.backends import Backend, select_backend
from ds_serve.attention.builder import load_ops
from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import install, probe_layers
from ds_serve.attention.latent import use_latents
from ds_serve.attention.layout import KVLayout
from ds_serve.model.adapters import adapt
from ds_serve.model.injection import inject
from ds_serve.model.repairs import Heads
from ds_serve.model.sharding import shard
from ds_serve.parallel.grid import Grid, meet

NUM_TOKENS = 21


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] by the attention that model has."""
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0].float()


def paged(model, grid: Grid) -> Backend:
    """model's attention is ds_paged from now on."""
    adapt(model, grid.place, lambda: NUM_TOKENS)
    name = "reference" if model.dtype == torch.float32 else "auto"
    backend = select_backend(torch.device("cpu"), model.dtype, 16, name)
    install(model, backend)
    return backend


def paged_logits(model, ids: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
    """[T, V] of all tokens in one chunk, or [S, V] of the sampled ones."""
    layout = KVLayout(tuple(probe_layers(model)), 16, model.dtype)
    count = ids.shape[1]
    blocks = -(-count // 16)
    batch = AttentionBatch(
        slab=layout.allocate(blocks, "cpu"),
        layout=layout,
        slot_mapping=torch.arange(count),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        context_len=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        positions=torch.arange(count),
        num_tokens=count,
        sampled=sampled,
    )
    keep = 0 if sampled is None else sampled
    with use_batch(batch), torch.inference_mode():
        out = model(input_ids=ids, position_ids=batch.positions[None], use_cache=False, logits_to_keep=keep)
    return out.logits[0].float()


def parameters(model) -> int:
    """Elements of all parameters; a view of another counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values()) // 4


def uncut(model, grid: Grid) -> int:
    """Elements that belong to every shard: all outside the decoder layers and the head, vectors, routers."""
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    matrix = re.compile(r".*\.(layers|h|blocks)\.\d+\.(?!.*(_a_proj|kv_a|altup|laurel|per_layer)).*")
    router = re.compile(
        r".*(router\.\w+|router\.layer\.\w+|\.gate\.weight|shared_expert_gate\.weight|down_proj_bias)"
    )
    copied = Heads.of(model.config, grid.place).kv_copies > 1
    kv = re.compile(r".*(k_proj|v_proj|qkv_proj|c_attn|query_key_value)\.weight" if copied else "$")
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if (p is not head or tied)
        and not (p.dim() > 1 and matrix.match(name) and not router.fullmatch(name) and not kv.fullmatch(name))
    )


def probe() -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


def of_all(value, grid: Grid) -> list:
    """value of each rank."""
    values: list = [None] * grid.place.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def run_fused(case: Case, grid: Grid) -> dict:
    """The shard's logits in bf16 before and after injection."""
    model, ids = shard(build(case.architecture, torch.bfloat16, **case.overrides), grid), probe()
    backend = paged(model, grid)
    wanted = paged_logits(model, ids)
    if case.spoil:
        case.spoil(model, grid)
    report = inject(model, backend, "auto", grid.all_reduce)
    found, some = paged_logits(model, ids), torch.tensor([4, NUM_TOKENS - 1])
    of_some, of_none = paged_logits(model, ids, some), paged_logits(model, ids, some[:0])
    return {
        "available": load_ops() is not None and bool(torch.ops.ds_serve.has_avx512_bf16()),
        "injected": of_all(report.injected, grid),
        "kinds": of_all([type(layer).__name__ for layer in model.model.layers], grid),
        "reasons": of_all(report.reasons, grid),
        "difference": ((found - wanted).norm() / wanted.norm()).item(),
        "difference_of_some": ((of_some - found[some]).norm() / found[some].norm()).item(),
        "of_none": list(of_none.shape),
    }


def run(case: Case, grid: Grid) -> dict:
    model, ids = build(case.architecture, **case.overrides), probe()
    wanted, whole, in_full = logits(model, ids), parameters(model), uncut(model, grid)
    model = shard(model, grid)
    if case.spoil:
        case.spoil(model, grid)
    own = parameters(model)
    found = [logits(model, ids)]
    paged(model, grid)
    found.append(paged_logits(model, ids))
    latents = use_latents(model)
    if latents:
        found.append(paged_logits(model, ids))
    return {
        "latents": of_all(latents, grid),
        "difference": max((each - wanted).abs().max().item() for each in found),
        "argmax": all(torch.equal(each.argmax(-1), wanted.argmax(-1)) for each in found),
        "whole": whole,
        "uncut": in_full,
        "shards": of_all(own, grid),
        "left_behind": hasattr(DeepSpeedInferenceConfig, "get_partition_config_object"),
    }


def main() -> None:
    meet()
    grid = Grid.make(int(os.environ["WORLD_SIZE"]), 1)
    for name in sys.argv[1:]:
        try:
            record = run_fused(FUSED[name], grid) if name in FUSED else run(CASES[name], grid)
        except Exception:
            record = {"error": traceback.format_exc()}
        errors = of_all(record.get("error"), grid)
        record["error"] = next(filter(None, errors), None)
        if grid.place.rank == 0:
            print(json.dumps({"case": name} | record), flush=True)
        if any(errors) and not all(errors):  # the ranks are no longer in step
            break
    grid.close()


main()
