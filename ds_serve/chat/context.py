"""Shared contexts: a system text is computed once, and the server keeps it under a handle.

A handle is prompt_cache_key with prompt_cache_ttl; where the server knows no such fields, the text is
computed beforehand all the same. Knows the server and sessions; the chat tab calls it.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from typing import Any

import openai

from ds_serve.chat.client import Server
from ds_serve.chat.failures import FAILURES, sentence

_TTL_S = 600  # since the last use


class Contexts:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._keys: dict[str, str] = {}  # what each session has kept
        self._handles = True  # until the server refuses them

    def fields(self, text: str) -> dict[str, Any]:
        """What a request that begins with this text has in its body: it renews the handle."""
        kept = self._handles and key_of(text) in self._keys.values()
        return {"prompt_cache_key": key_of(text), "prompt_cache_ttl": _TTL_S} if kept else {}

    async def keep(self, session: str, text: str, model: str | None) -> str:
        """Computes text for this session and lets go what it had before; a sentence on how that went."""
        if self._keys.get(session) != key_of(text):
            await self.drop(session)
        if not text:
            return ""
        self._keys[session] = key_of(text)
        started = time.perf_counter()
        try:
            usage = await self._compute(text, model)
        except FAILURES as error:
            del self._keys[session]
            return sentence(error, self._server.base_url)
        took = (time.perf_counter() - started) * 1000
        cached = (usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0
        how = f"ready in {took:,.0f} ms" + (f", {cached:,} of them were cached" if cached else "")
        return f"{usage.prompt_tokens:,} tokens, {how}. The next answer starts after them."

    async def drop(self, session: str) -> None:
        """Releases what the session kept, if no other session has it too."""
        key = self._keys.pop(session, None)
        if key is not None and self._handles and key not in self._keys.values():
            with suppress(*FAILURES):
                await self._server.release(key)

    async def _compute(self, text: str, model: str | None) -> Any:
        try:
            return await self._server.compute(text, self.fields(text), model)
        except openai.BadRequestError as error:
            if not self._handles or "prompt_cache" not in f"{error.param} {error.message}":
                raise
            self._handles = False
            return await self._server.compute(text, {}, model)


def key_of(text: str) -> str:
    return "chat-" + hashlib.sha256(text.encode()).hexdigest()[:32]
