"""`ds-serve bench`: one run, a sweep or a profile, from the command line's flags to an exit code.

Knows what is printed and saved, and in which order. The command line calls run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_serve.bench.options import DEFAULT_STEP_S, Options
from ds_serve.bench.slo import Goal
from ds_serve.bench.sweep import highest_good

if TYPE_CHECKING:
    from ds_serve.bench.client import Client
    from ds_serve.bench.measure import Run, Target
    from ds_serve.bench.workload import Material

GOOD, MISSED, INTERRUPTED = 0, 1, 130


def run(args: dict[str, Any]) -> int:
    """The exit code. Raises ValueError for bad arguments, a bad file or a package that is not installed."""
    options = Options.take(args)
    for package in ["aiohttp"] + (["matplotlib"] if options.out is not None and options.plot else []):
        if importlib.util.find_spec(package) is None:
            hint = ", or give --no-plot" if package == "matplotlib" else ""
            raise ValueError(f"{package} is not installed: pip install 'ds_serve[bench]'{hint}")
    if options.out is not None:
        _make_folder(options.out)
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        return runner.run(_bench(options))


def _fast_loop() -> Any:
    """uvloop's where it is installed: half the processor time an event (benchmarks/bench_client.py)."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def _make_folder(name: str) -> None:
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {error}") from error


async def _bench(options: Options) -> int:
    from ds_serve.bench.client import Client, Unreachable
    from ds_serve.bench.load import WarmUpFailed
    from ds_serve.bench.measure import look
    from ds_serve.bench.mission import mission
    from ds_serve.bench.workload import material

    async with Client(options) as client:
        try:
            target = await look(client, options)
            if options.profile == "mission":
                return await mission(client, target, options)
            drawn = material(options, target.vocab)
            _announce(options, target, drawn)
            if options.sweep is not None:
                return await _sweep(client, target, options, drawn)
            return await _single(client, target, options, drawn)
        except (Unreachable, WarmUpFailed) as error:
            print(f"ds-serve bench: {error}", file=sys.stderr)
            return MISSED


def _announce(options: Options, target: Target, drawn: Material) -> None:
    print(f"{target.model} at {options.url}: {describe(options)}")
    if drawn.left_out:
        print(f"{drawn.left_out} requests of the trace are left out: prompts over {options.max_input_tokens}")


def describe(options: Options) -> str:
    """The load in words."""
    manner = "streamed" if options.streams else "not streamed"
    limit = "" if options.concurrency is None else f", at most {options.concurrency} at once"
    if options.sweep is not None:
        pace = f"sweep {options.sweep}"
    elif options.timed_by_trace:
        pace = f"at the trace's times x {options.trace_speed or 1:g}{limit}"
    elif options.rate is not None:
        shape = "" if options.arrival != "gamma" else f" (gamma, burstiness {options.burstiness or 1:g})"
        pace = f"open loop, {options.rate:g} requests/s{shape}{limit}"
    else:
        pace = f"closed loop, {options.concurrency or 16} at a time"
    return f"{options.endpoint}, {manner}, {pace}"


async def _single(client: Client, target: Target, options: Options, drawn: Material) -> int:
    from ds_serve.bench.measure import measure
    from ds_serve.bench.tables import summary_table, verdict_lines

    done = await measure(client, target, options, drawn, goals=options.slo)
    print(summary_table(done.summary, open_loop=options.open_loop, accounts=done.accounts))
    if done.verdicts:
        print(f"\n{verdict_lines(done.verdicts)}")
    if options.out is not None:
        save(Path(options.out), options, target, done)
        print(f"\nsaved in {options.out}")
    if done.load.interrupted:
        return INTERRUPTED
    return GOOD if done.met and not done.all_failed else MISSED


def save(folder: Path, options: Options, target: Target, done: Run, *, plot: bool = True) -> None:
    """report.json, requests.csv and, where wanted, report.png."""
    from ds_serve.bench import files

    rows = files.request_rows(done.load)
    report = _head(options, target) | {
        "interrupted": done.load.interrupted,
        "summary": done.summary.plain(),
        "server": done.accounts,
        "goals": [_verdict(verdict) for verdict in done.verdicts],
        "requests": rows,
    }
    files.save_json(folder, report)
    files.save_rows(folder, rows)
    if plot and options.plot and done.load.records:
        from ds_serve.bench.plots import draw_run

        draw_run(folder / "report.png", f"{target.model}: {describe(options)}", done)


def _head(options: Options, target: Target) -> dict[str, Any]:
    from ds_serve.bench import files

    settings = {name: value for name, value in asdict(options).items() if name not in ("api_key", "slo")}
    for name in ("input_tokens", "output_tokens", "sweep"):
        settings[name] = None if getattr(options, name) is None else str(getattr(options, name))
    settings["slo"] = [goal.text for goal in options.slo]
    served = {"model": target.model, "engine": target.engine, "vocab": target.vocab}
    return {"options": settings, "target": served, "environment": files.environment()}


def _verdict(verdict: Any) -> dict[str, Any]:
    return {"goal": verdict.goal.text, "measured": verdict.value, "met": verdict.met}


class _Interrupted(Exception):
    pass


async def _sweep(client: Client, target: Target, options: Options, drawn: Material) -> int:
    from ds_serve.bench.measure import measure
    from ds_serve.bench.tables import sweep_table

    levels, goals = options.sweep, _sweep_goals(options.slo)
    steps: list[tuple[float, Run]] = []

    async def is_good(level: float) -> bool:
        step = _at_level(options, level)
        name = f"{levels.parameter} {level:g}"
        done = await measure(client, target, step, drawn.reseeded(len(steps)), goals=goals, name=name)
        if options.out is not None:
            save(Path(options.out) / f"{levels.parameter}-{level:g}", step, target, done, plot=False)
        if done.load.interrupted:
            raise _Interrupted
        steps.append((level, done))
        print(f"{name}: {'; '.join(map(str, done.verdicts))}", flush=True)
        return done.met

    best, interrupted = None, False
    try:
        best = await highest_good(levels, is_good)
    except _Interrupted:
        interrupted = True
    if steps:
        table = [(level, done.summary, done.verdicts) for level, done in steps]
        print(f"\n{sweep_table(levels.parameter, table)}")
        _save_sweep(options, target, steps, best)
    if interrupted:
        return INTERRUPTED
    found = "no level meets the goals" if best is None else f"highest good {levels.parameter}: {best:g}"
    print(f"\n{found}")
    return GOOD if best is not None else MISSED


def _sweep_goals(goals: tuple[Goal, ...]) -> tuple[Goal, ...]:
    """Latencies are of good requests only, so a level that fails many must not pass for good."""
    if any(goal.metric == "success" for goal in goals):
        return goals
    return (*goals, Goal.parse("success=99%"))


def _at_level(options: Options, level: float) -> Options:
    pace = {"rate": level} if options.sweep.parameter == "rate" else {"concurrency": int(level)}
    if options.requests is None and options.duration is None:
        pace["duration"] = DEFAULT_STEP_S
    return replace(options, sweep=None, **pace)


def _save_sweep(options: Options, target: Target, steps: list[tuple[float, Run]], best: float | None) -> None:
    if options.out is None:
        return
    from ds_serve.bench import files

    rows = [
        {
            "level": level,
            "summary": done.summary.plain(),
            "server": done.accounts,
            "goals": [_verdict(verdict) for verdict in done.verdicts],
        }
        for level, done in sorted(steps, key=lambda step: step[0])
    ]
    folder = Path(options.out)
    files.save_json(folder, _head(options, target) | {"highest_good": best, "steps": rows})
    if options.plot:
        from ds_serve.bench.plots import draw_sweep

        draw_sweep(folder / "report.png", options.sweep.parameter, steps, best)
    print(f"saved in {options.out}")
