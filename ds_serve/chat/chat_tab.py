"""The Chat tab: its components, and what happens at each click.

Knows Gradio; a conversation and its answers are talk.py's, saved ones saved.py's, the context context.py's.
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from ds_serve.chat import document, saved, talk
from ds_serve.chat.client import Server
from ds_serve.chat.context import Contexts
from ds_serve.chat.controls import Advanced, Sampling
from ds_serve.chat.failures import FAILURES
from ds_serve.chat.picture import shown
from ds_serve.chat.saved import Chat

_FRAME_S = 0.06  # between two pictures of a growing answer
_SECRET = (
    "ds_serve.chat"  # no secret: without a fixed one a browser could not read what it kept before a restart
)
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# Gradio's script may lose what comes of an event that begins while the stream of another one is closed: only
# answers are streamed.
_SHORT = _QUIET | {"queue": False}
_PROMPTS = ("What is the capital of France?", "Tell me a story", "What is ds_serve?")

Updates = AsyncIterator[dict[Any, Any]]


class ChatTab:
    """Its handlers get all inputs as a dictionary by component, and return the components to change."""

    def __init__(self, server: Server, system: str = "") -> None:
        self._server = server
        self._system = system
        self._contexts = Contexts(server)
        self._stops: dict[str, asyncio.Event] = {}  # of the answers that are coming, by session

    def build(self, page: gr.Blocks) -> None:
        """Adds the components to the open tab, and their events to the page."""
        self.chat = gr.State(saved.new_chat(self._system))
        self.store = gr.BrowserState(saved.empty(), storage_key="ds_serve.chat", secret=_SECRET)
        with gr.Row(elem_id="chat-row"):
            with gr.Column(scale=3, min_width=320):
                self._build_talk()
            with gr.Column(scale=1, min_width=320, elem_id="side"):
                self._build_side()
        self._connect(page)

    def _build_talk(self) -> None:
        self.chatbot = gr.Chatbot(
            show_label=False,
            height="68vh",
            editable="user",
            buttons=["copy", "copy_all"],
            group_consecutive_messages=False,
            layout="bubble",
            allow_tags=False,
            placeholder="Ask something.",
            examples=[{"text": prompt} for prompt in _PROMPTS],
            elem_id="chatbot",
        )
        self.box = gr.Textbox(
            show_label=False,
            placeholder="Message. Enter sends, Shift+Enter begins a line",
            lines=1,
            max_lines=8,
            submit_btn=True,
            autofocus=True,
            elem_id="message",
        )

    def _build_side(self) -> None:
        with gr.Accordion("Conversations", open=True, elem_id="conversations"):
            with gr.Row():
                self.new = gr.Button("New chat", size="sm", variant="primary", min_width=80)
                self.delete = gr.Button("Delete", size="sm", min_width=80)
            self.list = gr.Radio([], show_label=False, container=False, elem_id="saved")
        with gr.Accordion("Context", open=True):
            self.system = gr.Textbox(
                self._system, label="System prompt", lines=2, max_lines=8, elem_id="system"
            )
            with gr.Row():
                self.upload = gr.UploadButton(
                    "Add a text", file_types=document.ENDINGS, size="sm", min_width=80, elem_id="upload"
                )
                self.remove = gr.Button("Remove", size="sm", min_width=80)
            self.context = gr.HTML(elem_id="context")
        with gr.Accordion("Sampling", open=False, elem_id="sampling"):
            self.model = gr.Dropdown([], label="model", allow_custom_value=True, elem_id="model")
            with gr.Row(elem_classes="numbers"):
                self.sampling = Sampling()
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.advanced = Advanced()

    def _connect(self, page: gr.Blocks) -> None:
        everything = {
            self.chat,
            self.store,
            self.box,
            self.system,
            self.model,
            *self.sampling.components,
            *self.advanced.components,
        }
        talking = [self.chatbot, self.box, self.chat, self.store, self.list]
        changing = [*talking, self.system, self.context]
        self.box.submit(self._send, everything, talking, **_QUIET)
        self.chatbot.example_select(self._send_example, everything, talking, **_QUIET)
        self.chatbot.retry(self._retry, everything, talking, **_QUIET)
        self.chatbot.edit(self._edit, everything, talking, **_QUIET)
        self.chatbot.undo(self._undo, everything, talking, **_SHORT)
        self.box.stop(self._stop, None, None, **_SHORT)
        gr.on([self.chatbot.clear, self.delete.click], self._delete, everything, changing, **_SHORT)
        self.new.click(self._new, everything, changing, **_SHORT)
        self.list.input(self._choose, {*everything, self.list}, changing, **_SHORT)
        self.system.blur(self._set_system, everything, [self.chat, self.context], **_SHORT)
        self.upload.upload(self._add, {*everything, self.upload}, [self.chat, self.context], **_SHORT)
        self.remove.click(self._remove, everything, [self.chat, self.context], **_SHORT)
        page.load(self._load, everything, [*changing, self.model], **_SHORT)
        page.unload(self._leave)

    # Answers

    async def _send(self, given: dict[Any, Any], request: gr.Request) -> Updates:
        async with aclosing(self._say(given[self.box], given, request)) as updates:
            async for update in updates:
                yield update

    async def _send_example(
        self, given: dict[Any, Any], event: gr.SelectData, request: gr.Request
    ) -> Updates:
        async with aclosing(self._say(event.value["text"], given, request)) as updates:
            async for update in updates:
                yield update

    async def _say(self, text: str, given: dict[Any, Any], request: gr.Request) -> Updates:
        if not text.strip():
            return
        turns = [*given[self.chat]["turns"], {"role": "user", "content": text}]
        async with aclosing(self._answer(turns, given, request)) as updates:
            async for update in updates:
                yield update

    async def _retry(self, given: dict[Any, Any], event: gr.RetryData, request: gr.Request) -> Updates:
        turns = given[self.chat]["turns"]
        kept = turns[: _turn_of(turns, event) + 1]
        async with aclosing(self._answer(kept, given, request)) as updates:
            async for update in updates:
                yield update

    async def _edit(self, given: dict[Any, Any], event: gr.EditData, request: gr.Request) -> Updates:
        turns = given[self.chat]["turns"]
        kept = [*turns[: _turn_of(turns, event)], {"role": "user", "content": event.value}]
        async with aclosing(self._answer(kept, given, request)) as updates:
            async for update in updates:
                yield update

    async def _answer(self, turns: list[talk.Turn], given: dict[Any, Any], request: gr.Request) -> Updates:
        """Streams the next answer to turns into the page, then saves the conversation."""
        fields = self._fields(given)
        chat = given[self.chat] | {"turns": turns, "system": given[self.system] or ""}
        system = talk.system_text(chat["system"], chat["document"])
        fields |= self._contexts.fields(system)
        stop = self._stops[request.session_hash] = asyncio.Event()
        yield {self.chatbot: shown(turns)[0], self.box: _box(coming=True), self.chat: chat}
        drawn = 0.0
        async with aclosing(talk.answer(self._server, system, turns, fields, stop)) as pieces:
            async for _ in pieces:
                if time.monotonic() - drawn > _FRAME_S:
                    drawn = time.monotonic()
                    yield {self.chatbot: shown(turns)[0]}
        store = saved.put(given[self.store], chat)
        yield self._whole(chat) | {self.box: _box(coming=False)} | self._listing(store)

    def _fields(self, given: dict[Any, Any]) -> dict[str, Any]:
        chosen = {"model": given[self.model]} if given[self.model] else {}
        return chosen | self.sampling.fields(given) | self.advanced.fields(given)

    async def _undo(self, given: dict[Any, Any], event: gr.UndoData) -> dict[Any, Any]:
        turns = given[self.chat]["turns"]
        at = _turn_of(turns, event)
        chat = given[self.chat] | {"turns": turns[:at]}
        store = saved.put(given[self.store], chat)
        return self._whole(chat) | {self.box: turns[at]["content"]} | self._listing(store)

    async def _stop(self, request: gr.Request) -> None:
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    # Conversations

    async def _load(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        store = saved.checked(given[self.store])
        try:
            names = await self._server.models()
        except FAILURES:
            names = []
        updates = {self.model: gr.Dropdown(choices=names, value=names[0] if names else None)}
        chat = saved.get(store, store["current"]) or saved.new_chat(self._system)
        updates |= await self._show(chat, store, given, request)
        if request.session_hash in self._stops:  # a message was sent meanwhile: that is the conversation
            return {self.model: updates[self.model], self.list: updates[self.list]}
        return updates

    async def _new(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        await self._stop(request)
        chat = saved.new_chat(self._system)
        return await self._show(chat, given[self.store] | {"current": None}, given, request)

    async def _choose(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        await self._stop(request)
        store = given[self.store] | {"current": given[self.list]}
        chat = saved.get(store, given[self.list]) or saved.new_chat(self._system)
        return await self._show(chat, store, given, request)

    async def _delete(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        await self._stop(request)
        store = saved.drop(given[self.store], given[self.chat]["id"])
        return await self._show(saved.new_chat(self._system), store, given, request)

    async def _show(
        self, chat: Chat, store: saved.Store, given: dict[Any, Any], request: gr.Request
    ) -> dict[Any, Any]:
        """Another conversation, and its context."""
        updates = self._whole(chat) | self._listing(store) | {self.system: chat["system"]}
        return updates | await self._keep(chat, given, request)

    def _whole(self, chat: Chat) -> dict[Any, Any]:
        return {self.chatbot: shown(chat["turns"])[0], self.chat: chat}

    def _listing(self, store: saved.Store) -> dict[Any, Any]:
        return {self.store: store, self.list: gr.Radio(choices=saved.choices(store), value=store["current"])}

    # Context

    async def _set_system(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        if (given[self.system] or "") == given[self.chat]["system"]:
            return {self.chat: gr.skip()}
        return await self._keep(given[self.chat] | {"system": given[self.system] or ""}, given, request)

    async def _add(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        path = Path(given[self.upload])
        try:
            text = await asyncio.to_thread(document.read, str(path), path.name)
        except ValueError as error:
            return {self.context: f'<div class="failure" role="alert">{html.escape(str(error))}</div>'}
        finally:
            path.unlink(missing_ok=True)
        added = {"document": {"name": path.name, "text": text}, "system": given[self.system] or ""}
        return await self._keep(given[self.chat] | added, given, request)

    async def _remove(self, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        return await self._keep(given[self.chat] | {"document": None}, given, request)

    async def _keep(self, chat: Chat, given: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        system = talk.system_text(chat["system"], chat["document"])
        said = await self._contexts.keep(request.session_hash, system, given[self.model])
        name = f"<b>{html.escape(chat['document']['name'])}</b><br>" if chat["document"] else ""
        return {self.chat: chat, self.context: name + html.escape(said)}

    async def _leave(self, request: gr.Request) -> None:
        await self._stop(request)
        self._stops.pop(request.session_hash, None)
        await self._contexts.drop(request.session_hash)


def _box(*, coming: bool) -> gr.Textbox:
    """The message box: while an answer comes it has a stop button, and what is written meanwhile stays."""
    begun = {"value": ""} if coming else {}
    return gr.Textbox(submit_btn=not coming, stop_btn=coming, **begun)


def _turn_of(turns: list[talk.Turn], event: gr.RetryData | gr.UndoData | gr.EditData) -> int:
    """Which turn the message of an event is."""
    place = event.index[0] if isinstance(event.index, list | tuple) else event.index
    return shown(turns)[1][place]
