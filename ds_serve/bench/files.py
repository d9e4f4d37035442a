"""Saves a run: report.json (settings, environment, figures, one row a request) and requests.csv.

Knows files and JSON. Nothing of the prompts or answers is saved, and no key.
"""

from __future__ import annotations

import csv
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from ds_serve.bench.load import Load
from ds_serve.bench.records import Record


def environment() -> dict[str, Any]:
    """Where the client ran, and when."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "aiohttp": version("aiohttp"),
    }


def save_json(folder: Path, report: dict[str, Any], name: str = "report.json") -> None:
    """NaN becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.encode(report, enc_hook=str)
    (folder / name).write_bytes(msgspec.json.format(text, indent=1) + b"\n")


def save_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """requests.csv; no file where nothing was sent."""
    folder.mkdir(parents=True, exist_ok=True)
    if not rows:
        return
    with open(folder / "requests.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def request_rows(load: Load) -> list[dict[str, Any]]:
    """One row a request; times in seconds from the run's start, latencies in milliseconds."""
    return [_row(record, load.started) for record in load.records]


def _row(record: Record, started: float) -> dict[str, Any]:
    usage = record.usage
    return {
        "index": record.index,
        "intended_s": _rounded(record.intended - started),
        "sent_s": _rounded(record.sent - started) if record.sent else None,
        "end_s": _rounded(record.end - started) if record.end else None,
        "status": record.status or None,
        "failure": record.kind or None,
        "detail": record.detail or None,
        "prompts": record.prompts,
        "input_tokens": usage.prompt if usage else None,
        "cached_tokens": usage.cached if usage else None,
        "host_cached_tokens": usage.host_cached if usage else None,
        "output_tokens": record.output_tokens,
        "pieces": len(record.times),
        "ttft_ms": _ms(record.ttft),
        "tpot_ms": _ms(record.tpot),
        "longest_gap_ms": _ms(max(record.gaps, default=None)),
        "e2e_ms": _ms(record.e2e) if record.end else None,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
