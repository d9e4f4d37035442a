"""The server as the page sees it: OpenAI's client, and the two things beside it (cache handles, /metrics).

Knows the API and connections; knows no page. Failures are those of OpenAI's client, failures.py words them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai

from ds_serve.chat.answer import Answer

_CONNECT_S = 5.0
_SILENCE_S = 600.0  # the longest wait for the next piece: a queue may be long


class Server:
    """An OpenAI-compatible server. Belongs to one event loop, from its first call on."""

    def __init__(self, base_url: str, api_key: str | None = None, model: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self._model = model
        self._openai = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=api_key or "none",
            max_retries=0,
            timeout=openai.Timeout(_SILENCE_S, connect=_CONNECT_S),
        )

    @property
    def root(self) -> str:
        """The URL without /v1, where /metrics and /health are."""
        return self.base_url.removesuffix("/v1")

    async def models(self) -> list[str]:
        """Names of the models, the one asked for first."""
        names = [model.id async for model in self._openai.models.list()]
        return sorted(names, key=lambda name: name != self._model)

    async def model(self) -> str:
        """The model to use where none is chosen."""
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def stream(self, body: dict[str, Any], stop: asyncio.Event) -> AsyncIterator[Answer]:
        """Yields the same Answer whenever more of it has come, until its end or stop.

        It is read as it comes, however long the caller takes over what is yielded. Raises OpenAIError;
        ConnectionAbortedError where the stream ends before the answer does.
        """
        answer, news = Answer(), asyncio.Event()
        reading = asyncio.create_task(self._read(body, answer, news))
        stopped = asyncio.create_task(stop.wait())
        try:
            while not reading.done() and not stop.is_set():
                more = asyncio.create_task(news.wait())
                await asyncio.wait({reading, stopped, more}, return_when=asyncio.FIRST_COMPLETED)
                more.cancel()
                news.clear()
                yield answer
        finally:
            for task in (reading, stopped):
                task.cancel()
            await asyncio.wait({reading, stopped})
        if not reading.cancelled():
            reading.result()

    async def compute(self, system: str, fields: dict[str, Any], model: str | None) -> Any:
        """Lets the server compute a system text, so that prompts that begin with it find it; the usage."""
        reply = await self._openai.chat.completions.create(
            model=model or await self.model(),
            messages=[{"role": "system", "content": system}, {"role": "user", "content": "Hello"}],
            max_tokens=1,
            extra_body=fields,
        )
        return reply.usage

    async def release(self, key: str) -> None:
        """Lets go what is kept under a prompt_cache_key."""
        await self._openai.delete(f"/cache/{key}", cast_to=type(None))

    async def _read(self, body: dict[str, Any], answer: Answer, news: asyncio.Event) -> None:
        fields = dict(body)
        messages, model = fields.pop("messages"), fields.pop("model", None) or await self.model()
        async with await self._openai.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=fields,
        ) as stream:
            try:
                async for chunk in stream:
                    answer.take(chunk)
                    news.set()
            except openai.APIConnectionError as error:
                raise ConnectionAbortedError from error
        if answer.finish_reason is None:
            raise ConnectionAbortedError
