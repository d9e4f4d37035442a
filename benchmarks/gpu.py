"""Issue-sized figures of the engine on CUDA, in one table: each beside its goal, vLLM's figure and its floor.

    python benchmarks/gpu.py                 # one GPU
    python benchmarks/gpu.py --tp 2          # or --pp 2, through the deepspeed launcher
    python benchmarks/gpu.py --dry-run       # all of it in seconds on a CPU, with a tiny model

Llama-3.1-8B's shape with random bfloat16 weights, through the engine: what its caller sees. First a 2-layer
model of that shape must answer as transformers does (gpu_check.py), or nothing is timed. A cold start has
empty compile caches; the next engine finds them filled. Each engine is a process of its own (gpu_run.py).
vLLM is 0.26 on the same card. `--set name=value` sets any setting of the engine, to try things.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpu_check import verdict
from gpu_model import DRY, FULL, Ceilings, Floors, Scale, config_of, prepare
from gpu_run import run

from ds_serve.config import Settings
from ds_serve.launch import Options, end_group, several

PARTS = ("check", "cold", "decode", "ttft", "rate", "warm", "host", "profile")
CACHES = {  # of compiled code
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TORCH_EXTENSIONS_DIR": "extensions",  # DeepSpeed's too
    "CUDA_CACHE_PATH": "driver",
}


class Goal(NamedTuple):
    """goal is the most milliseconds or seconds, or the least rate; None: none is set."""

    goal: float | None
    vllm: str


GOALS = {
    "one": {
        "step/0": Goal(4.4, "4.86"), "step/1": Goal(6.0, "6.69"), "step/2": Goal(12.0, "13.47"),
        "ttft/0": Goal(46, "47.6"), "ttft/1": Goal(195, "205"),
        "hit/host": Goal(30, "40.5"), "hit/device": Goal(10, "11-15"),
        "rate/0": Goal(None, "5177"), "rate/1": Goal(7200, "6964"),
        "start/cold": Goal(60, "64"), "start/warm": Goal(25, ""),
    },
    "tp": {
        "step/0": Goal(3.0, "3.47"), "step/1": Goal(4.2, "4.40"), "step/2": Goal(8.5, "8.77"),
        "ttft/0": Goal(None, "33.3"), "ttft/1": Goal(None, "125"), "hit/device": Goal(None, "12"),
        "rate/0": Goal(None, "8045"), "rate/1": Goal(None, "11243"),
    },
    "pp": {
        "step/0": Goal(None, "4.97"), "step/1": Goal(None, "7.27"), "step/2": Goal(None, "9.78"),
        "ttft/0": Goal(None, "49.9"), "ttft/1": Goal(None, "206"), "hit/device": Goal(None, "20"),
        "rate/0": Goal(None, "5510"), "rate/1": Goal(None, "10968"),
        "ratio/0": Goal(1.5, "1.06"), "ratio/1": Goal(1.7, "1.57"),
    },
}  # fmt: skip


# -- jobs --------------------------------------------------------------------------------------------


class Jobs:
    """Starts engines, each in a process of its own; on a dry run in this one, but where a start is timed."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self._args, self._folder = args, folder
        self._settings = dict(each.split("=", 1) for each in args.set)

    def job(self, parts: list[str], tp: int = 1, pp: int = 1, folder: str | None = None) -> dict:
        return {
            "folder": folder or self._folder, "dry": self._args.dry_run, "tp": tp, "pp": pp, "parts": parts,
            "settings": self._settings,
        }  # fmt: skip

    def run(self, job: dict, caches: str | None = None, timed: bool = False) -> dict:
        """What gpu_run.run() has saved, and seconds to the first token. A process that fails says so on
        stderr; what it had saved until then counts, and its end is an error beside it."""
        if not timed and _stays(job):
            found: dict = {}
            run(job, found.update)
            return found
        return self._process("gpu_run", job, caches)

    def check(self, job: dict) -> list[str]:
        """The check's lines. SystemExit where the engine is not right, or could not be tried."""
        found = verdict(job) if _stays(job) else self._process("gpu_check", job)
        if "lines" not in found:
            reason = found.get("failure") or f"the check {found['errors']['process']}"
            raise SystemExit(f"the engine is not right here, so nothing was timed: {reason}")
        return found["lines"]

    def _process(self, module: str, job: dict, caches: str | None = None) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / "job.json", Path(folder) / "found.json"]
            files[0].write_text(json.dumps(job))
            command, environment = _command(module, job, [str(each) for each in files])
            if caches is not None and not job["dry"]:  # a CPU would compile its kernels for minutes
                environment |= _caches(caches)
            began = time.time()
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            try:
                end = child.wait(self._args.timeout) and f"ended with code {child.returncode}"
            except subprocess.TimeoutExpired:
                end = f"was not done in {self._args.timeout:.0f} seconds"
            finally:
                end_group(child.pid)
            found = json.loads(files[1].read_text()) if files[1].is_file() else {}
            if end:
                found.setdefault("errors", {})["process"] = end
            if "first_token_at" in found:
                found["first_token_s"] = found["first_token_at"] - began
            return found


def _stays(job: dict) -> bool:
    """Whether a job may run in this process."""
    return job["dry"] and job["tp"] * job["pp"] == 1


def _command(module: str, job: dict, files: list[str]) -> tuple[list[str], dict[str, str]]:
    here = Path(__file__).parent
    if job["tp"] * job["pp"] == 1:
        return [sys.executable, str(here / f"{module}.py"), *files], dict(os.environ)
    device = "cpu" if job["dry"] else "cuda"
    settings = Settings(
        model=job["folder"], device=device, tensor_parallel=job["tp"], pipeline_parallel=job["pp"]
    )
    started = several(settings, Options(), module, files)
    path = f"{here}:{os.environ.get('PYTHONPATH', '')}"
    return started.command, started.environment | {"PYTHONPATH": path}


def _caches(folder: str) -> dict[str, str]:
    return {name: f"{folder}/{part}" for name, part in CACHES.items()}


@contextlib.contextmanager
def _fresh(kept: str | None) -> Iterator[str]:
    """A folder for compile caches: an empty one, or the one that was named."""
    if kept is not None:
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="ds-serve-caches-") as folder:
            yield folder


def measure(args: argparse.Namespace, made: dict) -> Iterator[tuple[str, dict]]:
    """(kind, found) of each engine, as they end: the caller shows what is there should the next one fail."""
    jobs = Jobs(args, made["large"])
    world = {"tp": args.tp, "pp": args.pp}
    alone = args.tp * args.pp == 1
    cold = alone and "cold" in args.parts and args.caches is None  # kept caches are warm ones
    speed = [part for part in ("decode", "ttft", "rate", "profile") if part in args.parts]
    with _fresh(args.caches) as caches:
        if speed or cold:
            yield "cold" if cold else "first", jobs.run(jobs.job(speed, **world), caches, timed=cold)
        if alone and "warm" in args.parts:
            yield "warm", jobs.run(jobs.job([]), caches, timed=True)
        if alone and "host" in args.parts:
            yield "host", jobs.run(jobs.job(["host"]), caches)
        if args.pp > 1 and "rate" in args.parts:
            yield "one", jobs.run(jobs.job(["rate"]), caches)


# -- the table ---------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows as they come in. what: one, tp or pp."""

    what: str
    scale: Scale
    floors: Floors
    dry: bool

    def __post_init__(self) -> None:
        self._rows: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self.errors: list[str] = []

    def take(self, kind: str, found: dict) -> None:
        self.errors += [f"{part}: {reason}" for part, reason in found.get("errors", {}).items()]
        if kind in ("cold", "warm") and "first_token_s" in found:
            self._rows[f"start/{kind}"] = found["first_token_s"]
        if kind == "one":
            for number in range(len(self.scale.rates)):
                whole, one = self._rows.get(f"rate/{number}"), found.get("rows", {}).get(f"rate/{number}")
                if whole and one:
                    self._rows[f"ratio/{number}"] = whole / one
                    self._notes[f"ratio/{number}"] = f"one GPU {one:.0f}"
            return
        self._rows |= found.get("rows", {})
        self._notes |= found.get("notes", {})

    def lines(self) -> list[str]:
        head = f"{'':32}{'here':>9}{'goal':>9}{'':6}{'vLLM':>8}{'floor':>8}{'x floor':>9}"
        return [head, *(self._line(row, goal) for row, goal in GOALS[self.what].items())]

    def _line(self, row: str, goal: Goal) -> str:
        label, floor, upward = self._label(row)
        value = self._rows.get(row)
        bound = "" if goal.goal is None else f"{'>=' if upward else '<='} {goal.goal:g}"
        verdict = ""
        if self.dry:
            verdict = "dry"
        elif value is not None and goal.goal is not None:
            verdict = "ok" if (value >= goal.goal if upward else value <= goal.goal) else "MISS"
        shown = "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.2f}"
        least = "" if floor is None else f"{floor:.0f}" if floor >= 100 else f"{floor:.2f}"
        share = "" if floor is None or value is None else f"{floor / value if upward else value / floor:.2f}"
        line = f"{label:32}{shown:>9}{bound:>9} {verdict:5}{goal.vllm:>8}{least:>8}{share:>9}"
        return f"{line}  {self._notes.get(row, '')}".rstrip()

    def _label(self, row: str) -> tuple[str, float | None, bool]:
        """(what it is, its floor if it has one, whether more is better)."""
        kind, which = row.split("/")
        scale, floors, longest = self.scale, self.floors, self.scale.long[-1]
        match kind:
            case "step":
                rows = scale.batches[int(which)]
                return f"decode step, {rows} at once, ms", floors.step(rows), False
            case "ttft":
                length = scale.long[int(which)]
                return f"first token, {length} cold, ms", floors.cold(length), False
            case "hit":
                floor = floors.host_hit(longest) if which == "host" else floors.device_hit(longest)
                return f"first token, {longest}, {which} hit, ms", floor, False
            case "rate":
                rows = scale.rates[int(which)]
                return f"output, {rows} x {scale.prompt}+{scale.out}, tok/s", floors.rate(rows), True
            case "ratio":
                return f"output, {scale.rates[int(which)]} at once, over one GPU", None, True
        return f"start to first token, {which}, s", None, False


def _made(args: argparse.Namespace) -> dict:
    """Models and ceilings; by a process of its own, which gives the device's memory back."""
    arguments = (args.dry_run, args.folder, set(args.parts))
    if args.dry_run:
        return prepare(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(prepare, *arguments).result()


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        raise SystemExit(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.caches is not None:
        os.environ |= _caches(args.caches)  # for the check too
    made = _made(args)
    scale, ceilings = DRY if args.dry_run else FULL, Ceilings(**made["ceilings"])
    print(f"{made['device']}: {ceilings.line()}", flush=True)
    if "check" in args.parts:
        jobs = Jobs(args, made["small"])
        print("\n".join(jobs.check(jobs.job([], args.tp, args.pp))), flush=True)
    if "large" not in made:
        return 0
    what = "tp" if args.tp > 1 else "pp" if args.pp > 1 else "one"
    floors = Floors(config_of(args.dry_run), ceilings, scale, args.tp, args.pp)
    table = Table(what, scale, floors, args.dry_run)
    for kind, found in measure(args, made):
        table.take(kind, found)
        for name, text in found.get("texts", {}).items():
            print(f"-- {name}\n{text}")
        short = {row: round(value, 2) for row, value in found.get("rows", {}).items()}
        print(f"[{kind} engine done] {found.get('in_use')} {short}", flush=True)  # should no table come
    if args.dry_run:
        print("A dry run, tiny model on a CPU: these figures mean nothing, and goals and vLLM are of a GPU.")
    print(f"tp={args.tp} pp={args.pp} {' '.join(args.set)}")
    print("\n".join(table.lines()))
    for error in table.errors:
        print(f"FAILED {error}")
    return 1 if table.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    default = [part for part in PARTS if part != "profile"]
    parser.add_argument("--parts", default=",".join(default), help=f"of {','.join(PARTS)}")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting")
    parser.add_argument(
        "--folder", type=Path, help="where models are made; default: /dev/shm or the temporary one"
    )
    parser.add_argument(
        "--caches", help="keep compile caches here; default: an empty folder, gone after the run"
    )
    parser.add_argument("--timeout", type=float, default=540, help="seconds for each engine")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
