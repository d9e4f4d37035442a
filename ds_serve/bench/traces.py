"""Reads a trace file: when requests came, how long they were, and which beginnings they shared.

Knows the file format (docs/bench.md), no HTTP. One JSON object a line, gzip where the name ends in .gz:
t (s), in_len, out_len (tokens), and where prefixes are known block (tokens) and hash_ids (one a block;
equal ids mean equal prompts up to that block's end).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]


class TraceRow(msgspec.Struct):
    """One request of a trace. Other fields of a line are not read."""

    t: Annotated[float, msgspec.Meta(ge=0)]
    in_len: Count
    out_len: Count
    block: Count = 512
    hash_ids: list[int] = []


def read_trace(path: str, max_input_tokens: int | None = None) -> tuple[list[TraceRow], int]:
    """All rows by time, and how many were left out because their prompt is longer than max_input_tokens.

    Raises ValueError, naming file and line, for what is no trace.
    """
    rows = [decode_line(TraceRow, path, number, line) for number, line in lines_of(path, "--trace")]
    kept = [row for row in rows if max_input_tokens is None or row.in_len <= max_input_tokens]
    if not kept:
        raise ValueError(f"--trace: {path} has no request" + (" that is short enough" if rows else ""))
    kept.sort(key=lambda row: row.t)
    return kept, len(rows) - len(kept)


def lines_of(path: str, flag: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. Raises ValueError, naming the flag, for an unreadable file."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as error:
        raise ValueError(f"{flag}: {path}: {error}") from error


def decode_line(kind: type, path: str, number: int, line: bytes):
    """A line of JSON as this type. Raises ValueError that names file and line."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
