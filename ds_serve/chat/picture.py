"""How the turns of a conversation look: messages of gr.Chatbot, and what stands under an answer.

Knows Gradio's messages and turns as talk.py has them; the tabs call it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ds_serve.chat.talk import Turn


def shown(turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[int]]:
    """The chatbot's messages, and for each the index of its turn."""
    rows: list[tuple[int, dict[str, Any]]] = []
    for index, turn in enumerate(turns):
        rows += [(index, row) for row in _rows(turn, open_=index == len(turns) - 1)]
    return [row for _, row in rows], [index for index, _ in rows]


def _rows(turn: Turn, open_: bool) -> list[dict[str, Any]]:
    if turn["role"] == "user":
        return [{"role": "user", "content": turn["content"]}]
    if turn["role"] == "tool":
        return [_thought("Result", turn["content"])]
    rows = []
    waits = open_ and "stats" not in turn
    if turn["content"] or waits:
        rows.append({"role": "assistant", "content": turn["content"] or "…"})
    for call in turn.get("tool_calls", []):
        function = call["function"]
        rows.append(_thought(f"Calls {function['name']}", f"```json\n{function['arguments']}\n```"))
    below = under(turn)
    if below:
        # No text: the button that copies an answer leaves it out.
        rows.append({"role": "assistant", "content": gr.HTML(below, elem_classes="under")})
    return rows


def under(turn: Turn) -> str:
    """What stands under an answer, as HTML: what went wrong, and how fast it was."""
    parts = []
    if turn.get("error"):
        parts.append(f'<div class="failure" role="alert">{html.escape(turn["error"])}</div>')
    if turn.get("stats"):
        parts.append(f'<div class="stats">{html.escape(turn["stats"])}</div>')
    return "".join(parts)


def _thought(title: str, content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "metadata": {"title": title, "status": "done"}}
