"""The Compare tab: one prompt, answered under two settings at the same time, side by side.

Knows Gradio; how an answer comes is talk.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from ds_serve.chat import talk
from ds_serve.chat.client import Server
from ds_serve.chat.controls import Sampling
from ds_serve.chat.picture import under

_FRAME_S = 0.06  # between two pictures of the growing answers
_FIELDS = ("temperature", "top_p", "top_k", "max_tokens", "seed", "repetition_penalty")
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}
_TEMPERATURES = {"left": "0", "right": "1"}


class _Side:
    """One of the two: its settings and its answer."""

    def __init__(self, name: str) -> None:
        with gr.Column(min_width=300, elem_id=f"compare-{name}"):
            self.system = gr.Textbox(label="System prompt", lines=1, max_lines=6)
            with gr.Row(elem_classes="numbers"):
                self.sampling = Sampling(_FIELDS, f"{name}-", temperature=_TEMPERATURES[name])
            self.text = gr.Markdown(elem_id=f"{name}-answer", container=True, min_height=120)
            self.under = gr.HTML()
        self.inputs = {self.system, *self.sampling.components}

    def picture(self, turns: list[talk.Turn]) -> dict[Any, Any]:
        turn = turns[-1]
        return {
            self.text: turn["content"] if turn["role"] == "assistant" else "…",
            self.under: under(turn),
        }


class CompareTab:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._stops: dict[str, asyncio.Event] = {}  # of what is running, by session

    def build(self, page: gr.Blocks) -> None:
        """Adds the components to the open tab."""
        self.prompt = gr.Textbox(
            label="Prompt", lines=1, max_lines=8, submit_btn=True, elem_id="compare-prompt"
        )
        with gr.Row():
            self.sides = [_Side("left"), _Side("right")]
        outputs = [self.prompt] + [part for side in self.sides for part in (side.text, side.under)]
        inputs = {self.prompt}.union(*(side.inputs for side in self.sides))
        self.prompt.submit(self._run, inputs, outputs, **_QUIET)
        self.prompt.stop(self._stop, None, None, queue=False, **_QUIET)
        page.unload(self._leave)

    async def _run(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        if not given[self.prompt].strip():
            return
        stop = self._stops[request.session_hash] = asyncio.Event()
        answers = [[{"role": "user", "content": given[self.prompt]}] for _ in self.sides]
        pairs = list(zip(self.sides, answers, strict=True))
        tasks = [asyncio.create_task(self._answer(side, turns, given, stop)) for side, turns in pairs]
        yield {self.prompt: gr.Textbox(submit_btn=False, stop_btn=True)}
        try:
            going = set(tasks)
            while going:
                _, going = await asyncio.wait(going, timeout=_FRAME_S)
                yield {part: value for side, turns in pairs for part, value in side.picture(turns).items()}
        finally:
            stop.set()
            await asyncio.gather(*tasks)
        yield {self.prompt: gr.Textbox(submit_btn=True, stop_btn=False)}

    async def _answer(
        self, side: _Side, turns: list[talk.Turn], given: dict[Any, Any], stop: asyncio.Event
    ) -> None:
        fields = side.sampling.fields(given)
        system = talk.system_text(given[side.system] or "", None)
        async with aclosing(talk.answer(self._server, system, turns, fields, stop)) as pieces:
            async for _ in pieces:
                pass

    async def _stop(self, request: gr.Request) -> None:
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    async def _leave(self, request: gr.Request) -> None:
        await self._stop(request)
        self._stops.pop(request.session_hash, None)
