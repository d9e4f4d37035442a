"""Does this model, as it will be served, compute what transformers' original computes? Layer by layer.

A fixed probe goes through all ranks as requests do: paged, in chunks and single tokens, through whatever was
cut and injected. The first shard of each stage keeps what its decoder layers take and give, and runs the
original's layers beside it (model/original.py); all ranks get the figures. Knows no engine. Called by
cluster.py.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.attention.context import use_batch
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.messages import NewSequence, Row, SamplingParams
from ds_serve.model.certificate import AS_IS, FUSED, Certificate, Memory
from ds_serve.model.certificate import Row as Figures
from ds_serve.model.compare import added, errors, judge_local, judge_total, norms
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import LoadedModel
from ds_serve.model.original import Hidden, Original, Part, Seen, watch
from ds_serve.model.stage import stack_name
from ds_serve.parallel.grid import Grid
from ds_serve.worker.inputs import upload
from ds_serve.worker.slots import SlotTable

# The probe's sequences: within a block, at a block's ends, and of several blocks; 307 tokens.
LENGTHS = (1, 5, 16, 31, 33, 48, 67, 106)


def probe(vocab_size: int, max_model_len: int) -> list[torch.Tensor]:
    """Sequences of random token ids, int64[T], the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, vocab_size, (min(length, max_model_len),), generator=generator) for length in LENGTHS
    ]


@torch.inference_mode()
def certify(model: LoadedModel, settings: Settings, grid: Grid, kv_bytes: int) -> Certificate:
    """The same certificate on every rank, without greedy tokens; all ranks call it together.

    kv_bytes is what this rank's KV cache takes. Raises what reading the original raises.
    """
    _look_into(model)
    sequences = probe(model.vocab_size, model.max_model_len)
    served = _served(model, settings, grid, sequences)
    rows, end = [], None
    if grid.place.shard == 0:
        comparison = _Comparison(model, settings, grid, sequences)
        rows, end = comparison.run(served)
    figures = rows, end, _memory(model, grid, kv_bytes)
    found = grid.gather(figures)
    end = found[-grid.place.tp][1]
    return Certificate(
        model=settings.name,
        kind=type(model.stage.module).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=model.backend.name,
        tensor_parallel=grid.place.tp,
        pipeline_parallel=grid.place.pp,
        probe_tokens=sum(map(len, sequences)),
        streamed=end.streamed,
        rows=[row for each, *_ in found for row in each],
        logits=end.logits,
        same_argmax=end.same_argmax,
        memory=[memory for *_, memory in found],
    )


def _look_into(model: LoadedModel) -> None:
    """ModelLoadError where there are no decoder layers to look into."""
    try:
        stack_name(model.stage.module)
    except UnsupportedModelError as error:
        raise ModelLoadError(
            f"{type(model.stage.module).__name__} has no list of its decoder layers, so they cannot be "
            "compared one by one; serve it without check"
        ) from error


# -- the served side ---------------------------------------------------------------------------


def _served(model: LoadedModel, settings: Settings, grid: Grid, sequences: list[torch.Tensor]) -> Seen:
    """What this stage's decoder layers take and give for each of the probe's tokens, sequence by sequence."""
    table = SlotTable(len(sequences), max(map(len, sequences)) + 1, settings.block_size)
    needed = sum(-(-len(ids) // settings.block_size) for ids in sequences)
    slab = model.layout.allocate(needed, model.device)
    for slot, ids in enumerate(sequences):
        params = SamplingParams(max_tokens=1)
        table.admit(NewSequence(slot=slot, token_ids=ids.tolist(), num_prompt_tokens=len(ids), params=params))
    steps = _chunks(sequences, settings.block_size)
    seen = [_run(model, grid, table, rows, slab) for rows in steps]
    starts = [sum(map(len, sequences[:slot])) for slot in range(len(sequences))]
    places = [starts[row.slot] + row.start + i for rows in steps for row in rows for i in range(row.count)]
    order = torch.tensor(places).argsort().to(model.device)

    def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)[order]

    layers = model.stage.layers if grid.place.shard == 0 else ()
    return Seen(
        inputs={index: in_order([each.inputs[index] for each in seen]) for index in layers},
        outputs={index: in_order([each.outputs[index] for each in seen]) for index in layers},
        logits=in_order([each.logits for each in seen]) if grid.place.is_last_stage else None,
    )


def _chunks(sequences: list[torch.Tensor], block_size: int) -> list[list[Row]]:
    """Three steps: a first chunk of each sequence, then all but its last token, then that one alone.

    Blocks are given out from the last to the first, so that tables matter.
    """
    blocks = sum(-(-len(ids) // block_size) for ids in sequences)
    free, steps = list(range(blocks)), []
    held, done = [0] * len(sequences), [0] * len(sequences)
    for end_of in (lambda n: (2 * n) // 5, lambda n: n - 1, lambda n: n):
        rows = []
        for slot, ids in enumerate(sequences):
            end = end_of(len(ids))
            if end > done[slot]:
                lacking = -(-end // block_size) - held[slot]
                new = [free.pop() for _ in range(lacking)]
                rows.append(Row(slot=slot, start=done[slot], count=end - done[slot], new_block_ids=new))
                held[slot], done[slot] = held[slot] + lacking, end
        if rows:
            steps.append(rows)
    return steps


def _run(model: LoadedModel, grid: Grid, table: SlotTable, rows: list[Row], slab: torch.Tensor) -> Seen:
    """One step on this stage: what was seen of its tokens, on the first shard."""
    inputs, stage, seen = upload(table.gather(rows), slab, model.layout), model.stage, Seen()
    batch, count = inputs.attention, inputs.input_ids.shape[1]
    batch.sampled = None  # the last layer finishes all tokens
    every = torch.arange(count, device=model.device)
    hidden, given = None, {}
    if not grid.place.is_first_stage:
        hidden = torch.empty(1, count, stage.hidden_size, dtype=stage.dtype, device=model.device)
        given = {stage.first_layer: grid.receive(hidden).movedim(-2, 0)}
    watched = stage.layers if grid.place.shard == 0 else range(0)
    with use_batch(batch), watch(stage.module, watched, seen, given):
        output = stage(inputs.input_ids, batch.positions, every, hidden)
    if grid.place.is_last_stage:
        seen.logits = output
    else:
        grid.send_on(output)
    return seen


# -- beside the original -----------------------------------------------------------------------


@dataclass
class _End:
    """What is known where the logits are."""

    streamed: bool = True
    logits: float = 0.0
    same_argmax: float = 1.0


class _Chain:
    """The original in one dtype: its own hidden states, from layer to layer, over all stages."""

    def __init__(self, original: Original, sequences: list[torch.Tensor], state: torch.Tensor | None) -> None:
        self.original, self._sequences, self.state = original, sequences, state

    def run(self, part: Part, served: Seen) -> tuple[Seen, Seen]:
        """What part makes of the served inputs, and of the chain's own."""
        own: Hidden = {} if self.state is None else {part.layers.start: self.state}
        local = self._local(part, served)
        total = part.run(self._sequences, own)
        self.state = total.outputs[part.layers[-1]]
        return local, total

    def _local(self, part: Part, served: Seen) -> Seen:
        given = {index: served.inputs[index] for index in part.layers}
        return part.run(self._sequences, given, {index: served.outputs[index] for index in part.layers})


class _Comparison:
    """This stage's layers beside the original's. The chains' states come from the stage before."""

    def __init__(
        self, model: LoadedModel, settings: Settings, grid: Grid, sequences: list[torch.Tensor]
    ) -> None:
        self._model, self._grid = model, grid
        self._eps = torch.finfo(model.dtype).eps
        self._count = sum(map(len, sequences))
        self._original = Original(settings, torch.float32, model.device)
        self._chains = [
            _Chain(self._original.in_dtype(dtype), sequences, self._receive(dtype))
            for dtype in dict.fromkeys((torch.float32, model.dtype))
        ]

    def _receive(self, dtype: torch.dtype) -> torch.Tensor | None:
        if self._grid.place.is_first_stage:
            return None
        shape = self._count, 1, self._model.stage.hidden_size
        return self._grid.receive(torch.empty(shape, dtype=dtype, device=self._model.device))

    def run(self, served: Seen) -> tuple[list[Figures], _End]:
        """The rows of this stage, and, on the last one, what is known of the logits."""
        rows: list[Figures] = []
        end = _End(streamed=self._original.streamed)
        every = (chain.original.parts(self._model.stage.layers) for chain in self._chains)
        for parts in zip(*every, strict=True):
            self._part(parts, served, rows, end)
        if not self._grid.place.is_last_stage:
            for chain in self._chains:
                self._grid.send_on(chain.state)
        return rows, end

    def _part(self, parts: tuple[Part, ...], served: Seen, rows: list[Figures], end: _End) -> None:
        """The rows of parts, which are the same layers in each chain's dtype."""
        seen = [chain.run(part, served) for chain, part in zip(self._chains, parts, strict=True)]
        local, total = ([each[which] for each in seen] for which in (0, 1))
        if parts[0].layers.start == 0:
            kind = type(self._model.stage.module.get_input_embeddings()).__name__
            row = Figures(name="embedding", kind=kind, done=AS_IS)
            inputs = [each.inputs[0] for each in total]
            self._judge(judge_local, row, served.inputs[0], inputs, norms(inputs[0]), False)
            self._judge(judge_total, row, served.inputs[0], inputs, norms(inputs[0]), False)
            rows.append(row)
        for index in parts[0].layers:
            name = f"layer {index}"
            row = Figures(name=name, kind=self._original.kinds[index], done=self._done(name))
            found, outputs = served.outputs[index], [each.outputs[index] for each in local]
            scale = added(served.inputs[index], outputs[0])
            self._judge(judge_local, row, found, outputs, scale, parts[0].has_experts)
            outputs = [each.outputs[index] for each in total]
            self._judge(judge_total, row, found, outputs, norms(outputs[0]), self._original.has_experts)
            rows.append(row)
        if total[0].logits is not None:
            rows.append(
                self._head(served.logits, *([each.logits for each in which] for which in (local, total)))
            )
            end.logits = (served.logits.float() - total[0].logits).abs().max().item()
            same = served.logits.argmax(-1) == total[0].logits.argmax(-1)
            end.same_argmax = same.float().mean().item()

    def _head(self, found: torch.Tensor, local: list[torch.Tensor], total: list[torch.Tensor]) -> Figures:
        row = Figures(name="head", kind="norm and head", done=self._done("norm", "head"))
        self._judge(judge_local, row, found, local, norms(local[0]), False)
        self._judge(judge_total, row, found, total, norms(total[0]), self._original.has_experts)
        return row

    def _judge(
        self,
        judge: Callable,
        row: Figures,
        found: torch.Tensor,
        wanted: list,
        scale: torch.Tensor,
        experts: bool,
    ) -> None:
        """wanted: the original's in float32 and, in half precision, in the served dtype."""
        yardstick = errors(wanted[1], wanted[0], scale) if len(wanted) > 1 else None
        judge(row, errors(found, wanted[0], scale), yardstick, self._eps, experts)

    def _done(self, *names: str) -> str:
        choices = self._model.injection.choices
        kept = dict.fromkeys(choices.get(name, AS_IS) for name in names)
        return "; ".join(why for why in kept if why != FUSED) or FUSED


def _memory(model: LoadedModel, grid: Grid, kv_bytes: int) -> Memory:
    tensors = [*model.stage.module.parameters(), *model.stage.module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if model.device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = get_accelerator().max_memory_allocated()
    return Memory(rank=grid.place.rank, weights=sum(storages.values()), kv_cache=kv_bytes, peak=peak)
