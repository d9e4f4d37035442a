"""What is sent and when, for one run: bodies by request number, and an open loop's times.

Knows options, sources and bodies; sends nothing. Equal options and seed give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_serve.bench.arrivals import gamma, poisson
from ds_serve.bench.endpoints import Endpoint
from ds_serve.bench.lengths import Lengths
from ds_serve.bench.options import DEFAULT_REQUESTS, Options
from ds_serve.bench.prompts import FilePrompts, RandomPrompts, Source, TracePrompts, Wording
from ds_serve.bench.traces import TraceRow, read_trace

DEFAULT_VOCAB = 1000
_PREPARED_BYTES = 128 * 2**20
_INPUT, _OUTPUT = Lengths("fixed", 128), Lengths("fixed", 64)


@dataclass(frozen=True)
class Material:
    """The prompts to draw from, read once for all runs. left_out: a trace's prompts that are too long."""

    source: Source
    rows: list[TraceRow] | None = None
    left_out: int = 0

    def reseeded(self, step: int) -> Material:
        """The same, but for what prompts do not share: what step 0 left in a cache is not found there."""
        if isinstance(self.source, FilePrompts):
            return self
        return replace(self, source=replace(self.source, tail_seed=step))


def material(options: Options, vocab: int) -> Material:
    """Raises ValueError for a bad file."""
    wording = Wording(options.form == "ids", vocab)
    outputs = options.output_tokens or _OUTPUT
    if options.trace is not None:
        rows, left_out = read_trace(options.trace, options.max_input_tokens)
        return Material(TracePrompts(wording, rows, options.seed), rows, left_out)
    if options.prompts is not None:
        chat = options.endpoint in ("chat", "responses")
        return Material(FilePrompts(options.prompts, outputs, options.seed, chat=chat))
    return Material(
        RandomPrompts(
            wording,
            options.input_tokens or _INPUT,
            outputs,
            options.seed,
            shared_prefix=options.shared_prefix,
            groups=options.groups or 1,
        )
    )


class Workload:
    """One run's requests."""

    def __init__(self, options: Options, material: Material, endpoint: Endpoint) -> None:
        self._options, self._material, self._endpoint = options, material, endpoint
        self._prepared: list[bytes] = []

    def prepare(self) -> None:
        """Makes bodies beforehand, so that making them delays no reading; bounded in bytes."""
        size = 0
        for index in range(self.requests or 0):
            if size > _PREPARED_BYTES:
                return
            self._prepared.append(self._made(index))
            size += len(self._prepared[-1])

    def body(self, index: int) -> bytes:
        """The body of request number index; below 0 for warm-up."""
        return self._prepared[index] if 0 <= index < len(self._prepared) else self._made(index)

    def _made(self, index: int) -> bytes:
        each, prompt = self._options.prompts_each, self._material.source.prompt
        first = index * each
        return self._endpoint.body([prompt(first + offset) for offset in range(each)])

    @property
    def requests(self) -> int | None:
        """How many to send; None: until the duration is over."""
        options, size = self._options, self._material.source.size
        if options.requests is not None:
            return options.requests
        if options.timed_by_trace:
            return size
        if options.duration is not None:
            return None
        return DEFAULT_REQUESTS if size is None else max(1, size // options.prompts_each)

    def times(self) -> Iterator[float]:
        """An open loop's send times, seconds from the start."""
        options = self._options
        if options.timed_by_trace:
            speed = options.trace_speed or 1.0
            return iter([row.t / speed for row in self._material.rows or []])
        if options.arrival == "gamma":
            return gamma(options.rate, options.burstiness or 1.0, options.seed)
        return poisson(options.rate, options.seed)
