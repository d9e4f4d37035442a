"""What a check found out about a served model: plain values, their verdict, and a table of them.

Knows no tensor and no model. Filled by worker/certify.py and checking.py, printed by the latter.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FUSED, COMPILED, AS_IS = "fused", "compiled", "as is"


class Row(msgspec.Struct, kw_only=True):
    """One part of the model: the embedding, a decoder layer, or the head with the final norm.

    local          error where the original gets the served input, and local_bound what it may be, of the
                   token that comes nearest to its bound or exceeds it most; shares of what the part adds
    over           tokens above their bound, and over_allowed how many may be: one on the border between two
                   experts may take another
    total          error of all the parts so far, and total_bound; shares of the hidden state
    done           FUSED, COMPILED, or why the module runs as transformers wrote it
    """

    name: str
    kind: str = ""
    done: str = ""
    local: float = 0.0
    local_bound: float = 0.0
    over: int = 0
    over_allowed: int = 0
    total: float = 0.0
    total_bound: float = 0.0

    @property
    def fails(self) -> Literal["", "local", "total"]:
        """What is above its bound. A figure that is not a number is above every bound."""
        if self.over > self.over_allowed:
            return "local"
        return "" if self.total <= self.total_bound else "total"


class Greedy(msgspec.Struct, kw_only=True):
    """Greedy tokens of the engine beside the original's. ties: the original's best two are as near as makes
    no difference. mismatches are sentences."""

    prompts: int
    tokens: int
    ties: int = 0
    mismatches: list[str] = []


class Memory(msgspec.Struct, kw_only=True):
    """Bytes on one rank. peak is the process's largest resident set, on a GPU what it allocated there."""

    rank: int
    weights: int
    kv_cache: int
    peak: int


class Certificate(msgspec.Struct, kw_only=True):
    """logits is the largest difference of a logit over the probe, same_argmax the share of its tokens with
    the same best one. streamed: the original was read a layer at a time."""

    model: str
    kind: str
    dtype: str
    device: str
    attention: str
    tensor_parallel: int
    pipeline_parallel: int
    probe_tokens: int
    streamed: bool
    rows: list[Row]
    logits: float = 0.0
    same_argmax: float = 1.0
    memory: list[Memory] = []
    greedy: Greedy | None = None

    @property
    def first_failure(self) -> str:
        """A sentence on the first thing that differs; empty where nothing does.

        A part that computes something else comes before the errors that it brings about further on.
        """
        failing = [row for row in self.rows if row.fails]
        for row in sorted(failing, key=lambda row: row.fails != "local"):
            if row.fails == "local":
                return (
                    f"{row.name} ({row.kind}, {_brief(row)}) computes something else than the original: "
                    f"{row.over} of {self.probe_tokens} tokens are off by more than they may be, the worst "
                    f"by {row.local:.2g} of what it adds, where {row.local_bound:.2g} is allowed"
                )
            return (
                f"{row.name} ({row.kind}): the hidden states are off by {row.total:.2g}, above "
                f"{row.total_bound:.2g}, though no layer before it computes something else: they change "
                "between layers or stages"
            )
        if self.greedy is not None and self.greedy.mismatches:
            return f"greedy tokens differ: {self.greedy.mismatches[0]}"
        return ""

    @property
    def matches(self) -> bool:
        return not self.first_failure

    def to_json(self) -> bytes:
        """All fields, with verdict ("match" or "mismatch") and reason."""
        values = msgspec.to_builtins(self)
        for row, value in zip(self.rows, values["rows"], strict=True):
            value["verdict"] = row.fails or "ok"
        verdict = {"verdict": "match" if self.matches else "mismatch", "reason": self.first_failure}
        return msgspec.json.format(msgspec.json.encode(verdict | values))

    def table(self) -> str:
        """The certificate as text for a terminal; its last line is the verdict."""
        head = ("part", "class", "local", "bound", "total", "bound", "", "done")
        lines = [head]
        for row in self.rows:
            over = f"{row.fails or 'ok'}{f' ({row.over} over)' if row.over else ''}"
            figures = (row.local, row.local_bound, row.total, row.total_bound)
            lines.append((row.name, row.kind, *(f"{value:.1e}" for value in figures), over, _brief(row)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        pad = ["<", "<", ">", ">", ">", ">", "<", "<"]
        table = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, pad, widths, strict=True))
            for line in lines
        ]
        return "\n".join([*self._heading(), "", *(line.rstrip() for line in table), "", *self._rest()])

    def _kept(self) -> dict[str, list[str]]:
        """Why parts run as transformers wrote them: the classes of those parts by reason."""
        kept: dict[str, list[str]] = {}
        for row in self.rows:
            if row.done not in (FUSED, COMPILED, AS_IS):
                kinds = kept.setdefault(row.done, [])
                kinds += [row.kind] if row.kind not in kinds else []
        return kept

    def _heading(self) -> list[str]:
        how = "a layer at a time" if self.streamed else "whole (it cannot be cut between layers)"
        return [
            f"{self.model}: {self.kind}, {self.dtype} on {self.device}, tp {self.tensor_parallel} x pp "
            f"{self.pipeline_parallel}, attention {self.attention}",
            f"The original is transformers' in float32, read {how}; {self.probe_tokens} tokens went through "
            "both.",
            "local: error of a part on the same input, as a share of what it adds; total: error so far.",
        ]

    def _rest(self) -> list[str]:
        lines = [f"as is, {' and '.join(kinds)}: {why}" for why, kinds in self._kept().items()]
        same = f"{self.same_argmax:.1%} have the same best one"
        lines.append(f"logits: differ by at most {self.logits:.2g}, {same}")
        if self.greedy is None:
            lines.append("greedy: not compared (ds-serve check does, where no layer differs)")
        else:
            greedy = self.greedy
            same = greedy.tokens - greedy.ties - len(greedy.mismatches)
            lines.append(
                f"greedy: {same} of {greedy.tokens} tokens of {greedy.prompts} prompts are the original's "
                f"best, {greedy.ties} are near ties, {len(greedy.mismatches)} differ"
            )
        for memory in self.memory:
            lines.append(
                f"memory: rank {memory.rank}: weights {_size(memory.weights)}, KV cache "
                f"{_size(memory.kv_cache)}, peak {_size(memory.peak)} with a part of the original"
            )
        return [*lines, f"MISMATCH: {self.first_failure}" if self.first_failure else "MATCH"]


def _brief(row: Row) -> str:
    return row.done if row.done in (FUSED, COMPILED) else AS_IS


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"
