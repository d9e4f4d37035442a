"""The flags of `ds-serve bench`.

Knows flags and types, and imports nothing heavy: the command line builds this parser for every command.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

DESCRIPTION = """Send load to any OpenAI-compatible URL and say how it did. Closed loop: --concurrency
requests are always running. Open loop: requests are sent at a --rate, or at a trace's times, whatever the
server does, and latencies count from the intended time. Exit code 0: good; 1: a goal (--slo) was missed, or
nothing succeeded; 2: bad arguments; 130: interrupted (the report of what was measured comes all the same)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags; those not given are None, but for those with a default in their help."""
    _add_target(parser.add_argument_group("server"))
    _add_pace(parser.add_argument_group("pace"))
    _add_prompts(parser.add_argument_group("prompts"))
    _add_goals(parser.add_argument_group("goals and report"))


def _add_target(group: Any) -> None:
    group.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    group.add_argument("--model", metavar="NAME", help="default: the first of /v1/models")
    group.add_argument("--api-key-file", metavar="FILE", help="its first line; default: OPENAI_API_KEY")
    group.add_argument(
        "--endpoint",
        choices=["completions", "chat", "batch", "responses"],
        default="completions",
        help="batch: /v1/completions with --batch-size prompts a request; default: %(default)s",
    )
    group.add_argument("--batch-size", type=_at_least(1), metavar="N", help="default: 16")
    group.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="default: yes, but not for batch"
    )
    group.add_argument("--extra", metavar="JSON", help="fields for each body; null takes a field out")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for outputs of full length (an extension that some servers refuse); default: yes",
    )
    group.add_argument(
        "--usage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask streams for token counts; without them chunks are counted; default: yes",
    )
    group.add_argument(
        "--timeout", type=_above_zero, default=600.0, metavar="S", help="of a request; default: %(default)g"
    )


def _add_pace(group: Any) -> None:
    group.add_argument(
        "--concurrency",
        type=_at_least(1),
        metavar="N",
        help="closed loop of N (default: 16); in an open loop the most that run at once",
    )
    group.add_argument("--rate", type=_above_zero, metavar="R", help="open loop: requests a second")
    group.add_argument("--arrival", choices=["poisson", "gamma"], help="default: poisson")
    group.add_argument(
        "--burstiness", type=_above_zero, metavar="K", help="gamma's shape: below 1 bursts, above 1 even"
    )
    group.add_argument("--trace", metavar="FILE", help="JSON lines (.gz) of times, lengths, prefix hash ids")
    group.add_argument("--trace-speed", type=_above_zero, metavar="X", help="2: twice as fast; default: 1")
    group.add_argument(
        "--max-input-tokens", type=_at_least(1), metavar="N", help="leave out a trace's longer prompts"
    )
    group.add_argument(
        "--requests",
        type=_at_least(1),
        metavar="N",
        help="default: all of a file's, else 256, unless --duration is given",
    )
    group.add_argument("--duration", type=_above_zero, metavar="S", help="seconds in which requests are sent")
    group.add_argument(
        "--warmup", type=_at_least(0), default=0, metavar="N", help="requests before, not counted; default: 0"
    )


def _add_prompts(group: Any) -> None:
    lengths = "128, 64:256, exp:MEAN, normal:MEAN,DEVIATION or lognormal:MEDIAN,SIGMA"
    group.add_argument(
        "--input-tokens", type=_lengths, metavar="N", help=f"of random prompts: {lengths}; default: 128"
    )
    group.add_argument("--output-tokens", type=_lengths, metavar="N", help="likewise; default: 64")
    group.add_argument("--prompts", metavar="FILE", help="JSON lines of prompt or messages")
    group.add_argument(
        "--prompt-form",
        choices=["ids", "words"],
        help="token ids, or words of about a token each; default: ids where the endpoint takes them",
    )
    group.add_argument(
        "--vocab",
        type=_at_least(32),
        metavar="N",
        help="token ids are below it; default: what a ds_serve server says, else 1000",
    )
    group.add_argument(
        "--shared-prefix",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="tokens that a group's prompts share",
    )
    group.add_argument("--groups", type=_at_least(1), metavar="N", help="groups with a prefix; default: 1")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same workload; default: 0"
    )


def _add_goals(group: Any) -> None:
    group.add_argument(
        "--slo",
        action="append",
        metavar="GOAL",
        help="p99_ttft=200ms, mean_tpot=30ms, max_e2e=2s, tps=2000, rps=50, success=99.9%% (repeatable)",
    )
    group.add_argument(
        "--sweep",
        type=_levels,
        metavar="LEVELS",
        help="raise it until a goal breaks: rate=1:64 doubles, then halves the gap; rate=1,2,4 tries these",
    )
    group.add_argument(
        "--profile",
        choices=["mission"],
        help="mission: one-token requests with a cached prompt, single (64 at a time) and batch",
    )
    group.add_argument("--out", metavar="FOLDER", help="save report.json, requests.csv and report.png here")
    group.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw report.png")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a progress bar; default: on a terminal"
    )


def _at_least(lowest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return whole_number


def _above_zero(text: str) -> float:
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _lengths(text: str) -> Any:
    from ds_serve.bench.lengths import Lengths

    return _parsed(Lengths.parse, text)


def _levels(text: str) -> Any:
    from ds_serve.bench.sweep import Levels

    return _parsed(Levels.parse, text)


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:  # argparse shows the message of its own kind only
        raise argparse.ArgumentTypeError(str(error)) from error
