"""Conversations as the browser keeps them: plain functions over one JSON value.

The value is {"current": id, "chats": [chat, ...]}, newest first; a chat has id, title, turns, system and
document. Knows no page; the chat tab keeps the value in gr.BrowserState.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

Chat = dict[str, Any]
Store = dict[str, Any]

_MAX_CHATS = 50
_MAX_CHARS = 3_000_000  # browsers give a page about five million
_TITLE_CHARS = 40
_FIELDS = {"id": str, "title": str, "turns": list, "system": str}


def empty() -> Store:
    return {"current": None, "chats": []}


def new_chat(system: str = "") -> Chat:
    return {"id": uuid.uuid4().hex, "title": "", "turns": [], "system": system, "document": None}


def checked(value: Any) -> Store:
    """What a browser sent, without what is no chat: an older page may have written it."""
    chats = value.get("chats") if isinstance(value, dict) else None
    good = [chat for chat in chats if _is_chat(chat)] if isinstance(chats, list) else []
    return {"current": value.get("current") if good else None, "chats": good}


def _is_chat(chat: Any) -> bool:
    return (
        isinstance(chat, dict)
        and all(isinstance(chat.get(name), kind) for name, kind in _FIELDS.items())
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in chat["turns"])
    )


def put(store: Store, chat: Chat) -> Store:
    """With chat as the current and newest one; the oldest go where there is no room.

    An empty one is not kept.
    """
    others = [other for other in store["chats"] if other["id"] != chat["id"]]
    if not chat["turns"]:
        return {"current": None, "chats": others}
    chats, room = [], _MAX_CHARS
    for each in [chat | {"title": title(chat)}, *others][:_MAX_CHATS]:
        room -= len(json.dumps(each))
        if room < 0 and chats:
            break
        chats.append(each)
    return {"current": chat["id"], "chats": chats}


def get(store: Store, chat_id: str | None) -> Chat | None:
    return next((chat for chat in store["chats"] if chat["id"] == chat_id), None)


def drop(store: Store, chat_id: str) -> Store:
    return {"current": None, "chats": [chat for chat in store["chats"] if chat["id"] != chat_id]}


def choices(store: Store) -> list[tuple[str, str]]:
    """(title, id) of each chat, newest first."""
    return [(chat["title"] or "Untitled", chat["id"]) for chat in store["chats"]]


def title(chat: Chat) -> str:
    """The first thing that was said in it, cut."""
    first = next((turn["content"] for turn in chat["turns"] if turn["role"] == "user"), "")
    line = " ".join(first.split())
    return line if len(line) <= _TITLE_CHARS else line[: _TITLE_CHARS - 1].rstrip() + "…"
