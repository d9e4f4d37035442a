"""The flags of `ds-serve chat` and apps/chat.py, and what they say.

Knows flags and types, and imports nothing heavy: the command line builds this parser for every command.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

DESCRIPTION = """A chat page for any OpenAI-compatible URL. The server's API key is read from OPENAI_API_KEY.
Nothing is asked of any other host, and nothing is stored but in the reader's browser."""
LOGIN_VARIABLE = "DS_SERVE_CHAT_AUTH"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000/v1", metavar="URL", help="default: %(default)s")
    add("--model", metavar="NAME", help="default: the first of /v1/models")
    add("--host", default="127.0.0.1", help="address of the page; default: %(default)s")
    add("--port", type=int, default=7860, metavar="N", help="0: a free one; default: %(default)s")
    add(
        "--auth",
        metavar="LOGIN",
        help=f"who may in: user:password, or @FILE with one a line; default: {LOGIN_VARIABLE}, else everyone "
        "(others on this machine can read a command line)",
    )
    add("--system-prompt", metavar="TEXT", help="that every chat begins with; @FILE: the text of a file")
    add("--max-answers", type=_positive, default=16, metavar="N", help="at once; default: %(default)s")
    add(
        "--max-queue",
        type=_positive,
        default=64,
        metavar="N",
        help="that may wait for their turn; more are turned away; default: %(default)s",
    )


def logins(args: dict[str, Any]) -> list[tuple[str, str]]:
    """(user, password) of all who may in; none: everyone. Raises ValueError without what was given."""
    given = args["auth"] if args["auth"] is not None else os.environ.get(LOGIN_VARIABLE)
    if given is None:
        return []
    lines = [line.strip() for line in text(given, "--auth").splitlines()]
    pairs = [tuple(line.split(":", 1)) for line in lines if line and not line.startswith("#")]
    if not pairs or any(len(pair) < 2 or not all(pair) for pair in pairs):
        raise ValueError(f"--auth, {LOGIN_VARIABLE}: must be user:password, or @FILE with one such a line")
    return pairs


def text(value: str, flag: str) -> str:
    """value, or the text of the file that it names with an @. Raises ValueError where that cannot be read."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: cannot read {value[1:]}: {error}") from None


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
