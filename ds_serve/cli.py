"""The command line: ds-serve serve | generate | check | plan | bench | chat.

Turns flags into Settings (every setting is a flag), and starts the server or the pipeline; where these need
several ranks and no launcher has started them, the launcher first. Heavy imports happen only in the command
that needs them.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ds_serve import launch
from ds_serve.bench import arguments as bench_arguments
from ds_serve.chat import arguments as chat_arguments
from ds_serve.config import SECRETS, Settings, parse_bytes

DEMO = "demo"
SHORT = {"tensor_parallel": "--tp", "pipeline_parallel": "--pp"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2: bad arguments). Other ranks than rank 0 follow that one."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        rank = launch.ranks()
        if rank is not None and rank.rank > 0:
            from ds_serve.rank import follow

            return follow()
        return command(args)
    except (ValidationError, ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {_readable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-serve", description="Serve a Hugging Face causal LM on DeepSpeed."
    )
    # Launchers put it before everything else; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="an OpenAI-compatible server", description=_serve.__doc__)
    _add_settings(serve)
    launch.add_arguments(serve)
    serve.set_defaults(command=_serve)
    generate = commands.add_parser("generate", help="continue prompts", description=_generate.__doc__)
    _add_settings(generate)
    _add_generation(generate)
    launch.add_arguments(generate)
    generate.set_defaults(command=_generate)
    check = commands.add_parser(
        "check", help="compare a model with transformers' own, layer by layer", description=_check.__doc__
    )
    _add_settings(check)
    check.add_argument("--json", metavar="FILE", help="write the certificate there too")
    check.add_argument("--job", help=argparse.SUPPRESS)
    launch.add_arguments(check)
    check.set_defaults(command=_check)
    plan = commands.add_parser(
        "plan", help="what a model takes and what fits, before anything is loaded", description=_plan.__doc__
    )
    _add_settings(plan)
    plan.add_argument(
        "--device-memory", metavar="SIZE", help="of each accelerator (141GB); default: this machine's"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)
    bench = commands.add_parser(
        "bench", help="a load test of any OpenAI-compatible URL", description=bench_arguments.DESCRIPTION
    )
    bench_arguments.add_arguments(bench)
    bench.set_defaults(command=_bench)
    chat = commands.add_parser(
        "chat", help="a chat page for any OpenAI-compatible URL", description=chat_arguments.DESCRIPTION
    )
    chat_arguments.add_arguments(chat)
    chat.set_defaults(command=_chat)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag a setting; flags that are not given stay unset, so that environment and file count."""
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, help=f"model directory, or {DEMO!r} for the demo model"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    group = parser.add_argument_group("settings (also DS_SERVE_NAME in the environment, or name in the file)")
    for name, field in Settings.model_fields.items():
        if name == "model":
            continue
        if name in SECRETS:
            _refuse_flags(group, name)
            continue
        options: dict = {"default": argparse.SUPPRESS, "help": field.description, "dest": name}
        choices = typing.get_args(field.annotation)
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(field.annotation) is typing.Literal:
            options["choices"] = choices
        else:
            options["metavar"] = "N" if field.annotation is int or int in choices else "VALUE"
        spellings = [SHORT[name]] if name in SHORT else []
        group.add_argument(*spellings, f"--{name.replace('_', '-')}", **options)


def _refuse_flags(group, name: str) -> None:
    """A secret is no flag: everyone on the machine can read a command line."""

    class Refuse(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            file = ", or into the file of --api-key-file" if name == "api_keys" else ""
            parser.exit(
                2,
                f"{parser.prog}: {option_string}: others on this machine can read a command line (ps): "
                f"put it into the environment, as DS_SERVE_{name.upper()}{file}\n",
            )

    flag = f"--{name.replace('_', '-')}"
    hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    group.add_argument(*{flag, flag.removesuffix("s")}, action=Refuse, nargs="?", **hidden)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", action="append", help="a prompt (repeatable); default: lines of stdin")
    group.add_argument("--chat", action="store_true", help="each prompt is a user's message to a chat model")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default)")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text (may be given again)"
    )
    group.add_argument("--adapter", metavar="NAME", help="one of --adapters; default: the model itself")
    group.add_argument("--job", help=argparse.SUPPRESS)


def _settings(args: dict) -> Settings:
    names = {name for name in Settings.model_fields if name in args}
    flags = {name: args[name] for name in names}
    if flags.get("model") == DEMO:
        from ds_serve.demo import model_path

        flags |= {"model": model_path(), "served_model_name": flags.get("served_model_name", DEMO)}
    settings = Settings.load(args["config"], **flags)
    _log(settings)
    return settings


def _log(settings: Settings) -> None:
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(name)s: %(message)s")


def _must_launch(settings: Settings, options: launch.Options) -> bool:
    """Whether ranks are to be started here. ValueError where options or ranks do not fit the settings."""
    given, rank = ", ".join(options.given()), launch.ranks()
    if rank is not None:
        launch.check_world(settings, rank)
        if given:
            raise ValueError(f"{given}: for the launcher, which has started this process already")
    elif settings.world_size == 1 and given:
        raise ValueError(f"{given}: for several ranks: give --tp or --pp too")
    options.check()
    return rank is None and settings.world_size > 1


def _launch_followers(settings: Settings, options: launch.Options) -> int:
    """Starts this machine's ranks of a launch whose rank 0 is elsewhere. The launcher's code."""
    return launch.run(launch.several(settings, options, launch.RANK_MODULE, []))


def _serve(args: dict) -> int:
    """Serve a model over HTTP until SIGTERM or Ctrl-C."""
    from ds_serve.server.run import serve
    from ds_serve.server.supervisor import RestartPolicy

    settings, options = _settings(args), launch.Options.take(args)
    once = RestartPolicy(max_restarts=0)
    if not _must_launch(settings, options):
        # The rank of a launch cannot be started again alone.
        return serve(settings, policy=None if settings.world_size == 1 else once)
    if options.follows:
        return _launch_followers(settings, options)
    start = functools.partial(launch.several, settings, options, launch.RANK_MODULE)
    return serve(settings, start, once if options.no_ssh else None)


def _bench(args: dict) -> int:
    from ds_serve.bench.run import run

    args.pop("local_rank")
    return run(args)


def _chat(args: dict) -> int:
    from ds_serve.chat.run import run

    return run(args)


def _check(args: dict) -> int:
    """Does the model compute what transformers' own does? Exit code 0: yes, 1: no, and the output names the
    first layer that differs, 2: bad arguments or a model that is not served, 3: the check did not end."""
    if args["job"] is not None:
        job = Path(args["job"])
        settings, json_file = json.loads(job.read_text(encoding="utf-8"))
        code = _run_check(Settings.model_validate_json(settings), json_file)
        job.write_text(str(code), encoding="utf-8")
        return code
    settings = _settings(args | {"log_level": args.get("log_level", "warning")})
    options = launch.Options.take(args)
    must_launch = _must_launch(settings, options)
    if options.follows:
        return _launch_followers(settings, options)
    if args["json"] is not None and not Path(args["json"]).resolve().parent.is_dir():
        raise ValueError(f"--json {args['json']}: there is no such directory")
    if not must_launch:
        return _run_check(settings, args["json"])
    code, left = _launch_job("check", settings, options, [args["json"]])
    # Where ranks are lost the launcher's code is that of the first one, and not rank 0's.
    return int(left) if left.isdecimal() else code if code > 128 else 3


def _plan(args: dict) -> int:
    """What a model takes on each rank and what is left for KV, without loading it. Exit code 0: it fits,
    1: it does not, and the output proposes what would, 2: bad arguments or a model that is not served."""
    settings = _settings(args | {"log_level": args.get("log_level", "warning")})
    if launch.ranks() is not None:
        raise ValueError("plan: it needs no ranks: start it without a launcher")
    from ds_serve.planning import run

    return run(settings, parse_bytes(args["device_memory"]), args["json"])


def _run_check(settings: Settings, json_file: str | None) -> int:
    from ds_serve.checking import run

    _log(settings)
    return run(settings, json_file)


def _launch_job(command: str, settings: Settings, options: launch.Options, job: list) -> tuple[int, str]:
    """Starts the ranks, of which rank 0 does the job that it finds in a file. The launcher's code, and what
    the file holds in the end."""
    with tempfile.NamedTemporaryFile("w", prefix="ds-serve-", suffix=".json") as file:
        json.dump([settings.model_dump_json(), *job], file)
        file.flush()
        code = launch.run(launch.several(settings, options, "ds_serve", [command, "--job", file.name]))
        return code, Path(file.name).read_text(encoding="utf-8")


class _Job(NamedTuple):
    """What generate has to do: prompts (or chats), and the pipeline's arguments for the call."""

    settings: Settings
    inputs: list
    arguments: dict


def _generate(args: dict) -> int:
    """Continue prompts and print the texts: streamed for one prompt, in order for several."""
    if args["job"] is not None:
        return _run_job(_read_job(args["job"]))
    settings = _settings(args | {"log_level": args.get("log_level", "warning")})
    options = launch.Options.take(args)
    must_launch = _must_launch(settings, options)
    if options.follows:
        return _launch_followers(settings, options)
    job = _Job(settings, *_prompts(args))
    if not must_launch:
        return _run_job(job)
    return _launch_job("generate", settings, options, [job.inputs, job.arguments])[0]


def _prompts(args: dict) -> tuple[list, dict]:
    """The pipeline's inputs and the arguments of its call."""
    prompts = args["prompt"] or [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise ValueError("no prompt: give --prompt, or lines on stdin")
    inputs = [[{"role": "user", "content": prompt}] for prompt in prompts] if args["chat"] else prompts
    names = ("top_k", "top_p", "seed", "stop", "adapter")
    wanted = {name: args[name] for name in names if args[name] is not None}
    if args["temperature"] <= 0 and wanted.keys() & {"top_k", "top_p"}:
        raise ValueError("top_k and top_p do nothing at temperature 0: give --temperature")
    wanted |= {"max_new_tokens": args["max_new_tokens"], "do_sample": args["temperature"] > 0}
    if wanted["do_sample"]:
        wanted["temperature"] = args["temperature"]
    return inputs, wanted


def _read_job(file: str) -> _Job:
    """The job that the process which started the launcher wrote for rank 0."""
    settings, inputs, arguments = json.loads(Path(file).read_text(encoding="utf-8"))
    job = _Job(Settings.model_validate_json(settings), inputs, arguments)
    _log(job.settings)
    return job


def _run_job(job: _Job) -> int:
    from ds_serve.generation.pipeline import GenerationError, pipeline

    with pipeline(**job.settings.model_dump(exclude_defaults=True)) as pipe:
        try:
            _print_texts(pipe, job.inputs, job.arguments)
        except GenerationError as error:
            raise ValueError(str(error)) from error
    return 0


def _print_texts(pipe, inputs: list, wanted: dict) -> None:
    if len(inputs) == 1:
        for delta in pipe(inputs[0], stream=True, return_full_text=False, **wanted):
            print(delta, end="", flush=True)
        print()
        return
    for answers in pipe(inputs, return_full_text=False, **wanted):
        print(answers[0]["generated_text"])


def _readable(error: Exception) -> str:
    """One line for each bad setting, without pydantic's links."""
    if not isinstance(error, ValidationError):
        return str(error)
    problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return "; ".join(problems)
