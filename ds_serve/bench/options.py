"""What one load test is to do: the command line's values, checked against each other.

Knows names and ranges; starts nothing. Made by run.py of what arguments.py parsed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ds_serve.bench.lengths import Lengths
from ds_serve.bench.slo import Goal
from ds_serve.bench.sweep import Levels

Endpoint = Literal["completions", "chat", "batch", "responses"]

DEFAULT_REQUESTS = 256
DEFAULT_STEP_S = 10.0


@dataclass(frozen=True)
class Options:
    """One load test. A field None was not given; defaults that depend on others are properties."""

    url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    endpoint: Endpoint = "completions"
    stream: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    usage: bool = True

    concurrency: int | None = None
    rate: float | None = None
    arrival: Literal["poisson", "gamma"] | None = None
    burstiness: float | None = None
    trace: str | None = None
    trace_speed: float | None = None
    max_input_tokens: int | None = None
    requests: int | None = None
    duration: float | None = None
    warmup: int = 0
    timeout: float = 600.0

    prompts: str | None = None
    input_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    prompt_form: Literal["ids", "words"] | None = None
    vocab: int | None = None
    shared_prefix: int = 0
    groups: int | None = None
    batch_size: int | None = None
    seed: int = 0

    slo: tuple[Goal, ...] = ()
    sweep: Levels | None = None
    profile: Literal["mission"] | None = None
    out: str | None = None
    plot: bool = True
    progress: bool | None = None

    @classmethod
    def take(cls, args: dict[str, Any]) -> Options:
        """From parsed flags. Raises ValueError, naming the flag, for values that do not fit together."""
        args = dict(args)
        args["api_key"] = _api_key(args.pop("api_key_file"))
        args["extra"] = _extra(args["extra"])
        args["slo"] = tuple(map(Goal.parse, args["slo"] or ()))
        args["url"] = args["url"].rstrip("/")
        options = cls(**{name: value for name, value in args.items() if value is not None})
        options.check()
        return options

    @property
    def open_loop(self) -> bool:
        return self.rate is not None or self.timed_by_trace

    @property
    def timed_by_trace(self) -> bool:
        """Whether the trace's own times say when to send."""
        return self.trace is not None and self.rate is None and self.concurrency is None

    @property
    def streams(self) -> bool:
        return self.endpoint != "batch" if self.stream is None else self.stream

    @property
    def form(self) -> Literal["ids", "words"]:
        if self.prompt_form is not None:
            return self.prompt_form
        return "ids" if self.endpoint in ("completions", "batch") else "words"

    @property
    def prompts_each(self) -> int:
        """Prompts in one request."""
        return (self.batch_size or 16) if self.endpoint == "batch" else 1

    @property
    def several_choices(self) -> bool:
        return self.prompts_each > 1 or self.extra.get("n", 1) != 1

    def check(self) -> None:
        """Raises ValueError, naming the flag, for what does not fit together."""
        _check_url(self.url)
        for wrong, message in _contradictions(self):
            if wrong:
                raise ValueError(message)


def _contradictions(o: Options) -> list[tuple[bool, str]]:
    random = o.prompts is None and o.trace is None
    given = {"--concurrency": o.concurrency, "--rate": o.rate}
    paced = [name for name, value in given.items() if value is not None]
    return [
        (o.prompts is not None and o.trace is not None, "--prompts and --trace: give one of them"),
        (o.arrival is not None and o.rate is None and not _sweeps(o, "rate"), "--arrival: needs --rate"),
        (o.burstiness is not None and o.arrival != "gamma", "--burstiness: needs --arrival gamma"),
        (o.trace_speed is not None and o.trace is None, "--trace-speed: needs --trace"),
        (o.trace_speed is not None and bool(paced), f"--trace-speed: {', '.join(paced)} says when to send"),
        (o.max_input_tokens is not None and o.trace is None, "--max-input-tokens: needs --trace"),
        (o.batch_size is not None and o.endpoint != "batch", "--batch-size: needs --endpoint batch"),
        (o.groups is not None and not o.shared_prefix, "--groups: needs --shared-prefix"),
        (not random and bool(o.shared_prefix), "--shared-prefix: for random prompts only"),
        (not random and o.input_tokens is not None, "--input-tokens: for random prompts only"),
        (o.trace is not None and o.output_tokens is not None, "--output-tokens: the trace has them"),
        (o.prompts is not None and o.prompt_form is not None, "--prompt-form: the file has the prompts"),
        (o.form == "ids" and o.endpoint in ("chat", "responses"), f"--prompt-form: {o.endpoint} takes words"),
        (o.trace is not None and o.trace_speed is not None and o.trace_speed <= 0, "--trace-speed: above 0"),
        (_sweeps(o, "rate") and bool(paced) and o.rate is not None, "--sweep: it sets the rate; omit --rate"),
        (_sweeps(o, "concurrency") and bool(paced), f"--sweep concurrency: omit {', '.join(paced)}"),
        (o.sweep is not None and not o.slo, "--sweep: needs a goal that can break: give --slo"),
        (o.profile is not None and bool(_beside_profile(o)), f"--profile: it sets {_beside_profile(o)}"),
    ]


def _sweeps(o: Options, parameter: str) -> bool:
    return o.sweep is not None and o.sweep.parameter == parameter


def _beside_profile(o: Options) -> str:
    """The flags that a profile sets itself, and that were given."""
    names = ("rate", "trace", "prompts", "sweep", "batch_size", "duration", "output_tokens", "stream")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(o, name) is not None]
    return ", ".join(given + (["--endpoint"] if o.endpoint != "completions" else []))


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url: {url!r} is no http address such as http://127.0.0.1:8000/v1")


def _api_key(file: str | None) -> str | None:
    """The first line of the file, else OPENAI_API_KEY."""
    if file is None:
        return os.environ.get("OPENAI_API_KEY") or None
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file: {file} has no key")
    return keys[0]


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--extra: no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("--extra: must be a JSON object of body fields")
    if "stream" in fields:
        raise ValueError("--extra: say --stream or --no-stream")
    return fields
