"""A conversation: its turns, and the next answer to it with the tools it calls.

A turn is a message as OpenAI's API has it, and beside it stats (the line under an answer) and error (a
sentence). Knows no page; the tabs call it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from ds_serve.chat import tools
from ds_serve.chat.answer import Answer, Call
from ds_serve.chat.client import Server
from ds_serve.chat.failures import FAILURES, sentence

Turn = dict[str, Any]

_MAX_ROUNDS = 4  # answers in a row that call tools
_OURS = ("stats", "error")
_CUT_CALL = "The call of a tool was cut off. Raise max_tokens, then press retry."
_TOO_MANY_CALLS = f"The model called tools {_MAX_ROUNDS} times without an answer. Set tool_choice to none."


def system_text(prompt: str, document: Turn | None) -> str:
    """The system turn: a prompt, and below it the document (name and text), if there is one."""
    parts = [prompt.strip()]
    if document is not None:
        parts.append(f"Document {document['name']}:\n{document['text'].strip()}")
    return "\n\n".join(filter(None, parts))


def messages(system: str, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """What the server gets: without our fields, and without answers that never began."""
    sent = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if turn["role"] == "assistant" and not turn["content"] and not turn.get("tool_calls"):
            continue
        sent.append({name: value for name, value in turn.items() if name not in _OURS})
    return sent


async def answer(
    server: Server, system: str, turns: list[Turn], fields: dict[str, Any], stop: asyncio.Event
) -> AsyncIterator[list[Turn]]:
    """Appends the answer to turns as it comes, and yields them at each piece.

    Calls of tools are carried out and answered to. A failure ends it: the last turn then has an error, and
    the text so far.
    """
    fields = dict(fields)
    for _ in range(_MAX_ROUNDS):
        asked = messages(system, turns)
        turn: Turn = {"role": "assistant", "content": ""}
        turns.append(turn)
        said = Answer()
        try:
            async with aclosing(server.stream(fields | {"messages": asked}, stop)) as pieces:
                async for said in pieces:
                    turn["content"] = said.text
                    yield turns
        except FAILURES as error:
            turn["error"] = sentence(error, server.base_url)
        turn["stats"] = said.stats()
        if not said.calls or "error" in turn or stop.is_set():
            break
        if any(call.parsed() is None for call in said.calls):
            turn["error"] = _CUT_CALL
            break
        _carry_out(said.calls, turns)
        yield turns
        if fields.get("tool_choice", "auto") != "auto":
            fields["tool_choice"] = "none"
    else:
        turns[-1]["error"] = _TOO_MANY_CALLS
    yield turns


def _carry_out(calls: list[Call], turns: list[Turn]) -> None:
    turns[-1]["tool_calls"] = [call.on_the_wire() for call in calls]
    for call in calls:
        result = tools.call(call.name, call.parsed() or {})
        turns.append({"role": "tool", "tool_call_id": call.id, "content": result})
