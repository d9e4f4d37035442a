"""The command line: ds-serve serve | generate.

Turns flags into Settings (every setting is a flag), and starts the server or the pipeline. Heavy imports
happen only in the command that needs them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import typing
from collections.abc import Sequence

from pydantic import ValidationError

from ds_serve.config import Settings

DEMO = "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2: bad arguments)."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="an OpenAI-compatible server", description=_serve.__doc__)
    _add_settings(serve)
    serve.set_defaults(command=_serve)
    generate = commands.add_parser("generate", help="continue prompts", description=_generate.__doc__)
    _add_settings(generate)
    _add_generation(generate)
    generate.set_defaults(command=_generate)
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
        options: dict = {"default": argparse.SUPPRESS, "help": field.description}
        choices = typing.get_args(field.annotation)
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(field.annotation) is typing.Literal:
            options["choices"] = choices
        else:
            options["metavar"] = "N" if field.annotation is int or int in choices else "VALUE"
        group.add_argument(f"--{name.replace('_', '-')}", **options)


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


def _settings(args: dict) -> Settings:
    names = {name for name in Settings.model_fields if name in args}
    flags = {name: args[name] for name in names}
    if flags.get("model") == DEMO:
        from ds_serve.demo import model_path

        flags |= {"model": model_path(), "served_model_name": flags.get("served_model_name", DEMO)}
    settings = Settings.load(args["config"], **flags)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(name)s: %(message)s")
    return settings


def _serve(args: dict) -> int:
    """Serve a model over HTTP until SIGTERM or Ctrl-C."""
    from ds_serve.server.run import serve

    return serve(_settings(args))


def _generate(args: dict) -> int:
    """Continue prompts and print the texts: streamed for one prompt, in order for several."""
    from ds_serve.generation.pipeline import GenerationError, pipeline

    prompts = args["prompt"] or [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise ValueError("no prompt: give --prompt, or lines on stdin")
    inputs = [[{"role": "user", "content": prompt}] for prompt in prompts] if args["chat"] else prompts
    wanted = {name: args[name] for name in ("top_k", "top_p", "seed", "stop") if args[name] is not None}
    if args["temperature"] <= 0 and wanted.keys() & {"top_k", "top_p"}:
        raise ValueError("top_k and top_p do nothing at temperature 0: give --temperature")
    wanted |= {"max_new_tokens": args["max_new_tokens"], "do_sample": args["temperature"] > 0}
    if wanted["do_sample"]:
        wanted["temperature"] = args["temperature"]
    settings = _settings(args | {"log_level": args.get("log_level", "warning")})
    with pipeline(**settings.model_dump(exclude_defaults=True)) as pipe:
        try:
            _print_texts(pipe, inputs, wanted)
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
