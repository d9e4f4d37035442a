"""The page: its tabs in one Gradio app, mounted on a FastAPI app of ours.

Called by run.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import fastapi
import gradio as gr

from ds_serve.chat.chat_tab import ChatTab
from ds_serve.chat.client import Server
from ds_serve.chat.compare_tab import CompareTab
from ds_serve.chat.document import MAX_BYTES
from ds_serve.chat.engine import Engine
from ds_serve.chat.engine_tab import EngineTab
from ds_serve.chat.looks import CSS, KEEP_THEME, SWITCH_THEME, THEME

_TITLE = "ds_serve chat"
_KEEP_UPLOADS_S = 3600


class Limits(NamedTuple):
    """answers are made at once at most; queue more events may wait, the next is turned away."""

    answers: int
    queue: int


def create_app(
    server: Server,
    *,
    host: str,
    port: int,
    limits: Limits,
    logins: Sequence[tuple[str, str]] = (),
    system: str = "",
) -> fastapi.FastAPI:
    """The app that is served on host and port. logins are (user, password); where there are none, all may in.
    system is the system prompt that everyone begins with."""
    engine = Engine(server)

    @contextlib.asynccontextmanager
    async def watching(_: fastapi.FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(engine.watch())
        yield
        watch.cancel()

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=watching)
    return gr.mount_gradio_app(
        app,
        _page(server, engine, limits, system),
        path="/",
        server_name=host,
        server_port=port,
        auth=list(logins) or None,
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        theme=THEME,
        css=CSS,
    )


def _page(server: Server, engine: Engine, limits: Limits, system: str) -> gr.Blocks:
    with gr.Blocks(
        title=_TITLE, analytics_enabled=False, delete_cache=(_KEEP_UPLOADS_S, _KEEP_UPLOADS_S)
    ) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {_TITLE}")
            switch = gr.Button("Light / dark", size="sm", min_width=100, scale=0, elem_id="theme")
        switch.click(None, js=SWITCH_THEME, queue=False, api_visibility="private")
        page.load(None, js=KEEP_THEME, queue=False, api_visibility="private")
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", id="chat"):
                ChatTab(server, system).build(page)
            with gr.Tab("Engine", id="engine"):
                EngineTab(engine).build(tabs)
            with gr.Tab("Compare", id="compare"):
                CompareTab(server).build(page)
    return page.queue(api_open=False, max_size=limits.queue, default_concurrency_limit=limits.answers)
