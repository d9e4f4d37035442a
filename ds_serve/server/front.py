"""What the routes share: the model's name, its codec and defaults, and the way to its engine.

Knows no routes. run.py makes one; app.py hands it to every route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from ds_serve.server.chat_protocol import ChatBody, Turns
from ds_serve.server.client import EngineClient, EngineDeadError
from ds_serve.server.errors import ApiError, refusing
from ds_serve.server.gate import Door
from ds_serve.server.generation import Prompt
from ds_serve.server.metrics import Metrics
from ds_serve.server.protocol import CompletionBody
from ds_serve.server.sampling import check_prompt, sampling_params
from ds_serve.text.codec import TextCodec
from ds_serve.text.defaults import GenerationDefaults

if TYPE_CHECKING:
    from ds_serve.server.tracing import Tracing

T = TypeVar("T")

_INLINE_CHARS = 4096  # shorter texts are encoded in less time than a thread takes to answer


class Backend(Protocol):
    """Where the engine of the moment is found; Supervisor is one."""

    retry_after_s: int
    num_restarts: int

    @property
    def client(self) -> EngineClient:
        """The live engine's client. Raises EngineDeadError while there is none."""


@dataclass
class Front:
    """codec is None until the tokenizer is loaded; created is the model's time stamp in the API."""

    model_name: str
    defaults: GenerationDefaults
    backend: Backend
    created: int
    codec: TextCodec | None = None
    door: Door = field(default_factory=Door)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing | None = None
    # One thread: the tokenizer must not be encoding twice at once.
    _encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encode"))

    @property
    def client(self) -> EngineClient:
        """The engine's client. Raises EngineDeadError until engine and tokenizer are both there."""
        client = self.backend.client
        if self.codec is None:
            raise EngineDeadError("the tokenizer is loading")
        return client

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for any name but the model's."""
        if name != self.model_name:
            raise ApiError(
                404,
                f"model: {name!r} is not served here; {self.model_name!r} is",
                param="model",
                code="model_not_found",
            )

    async def chat_prompt(self, body: ChatBody, client: EngineClient) -> Prompt:
        """The rendered chat with its parameters. Raises ApiError."""
        token_ids = await self.encode_chat(body)
        with refusing():
            return self._prompt(body, client, token_ids, "messages")

    async def encode_chat(self, turns: Turns) -> list[int]:
        """The ids of a rendered chat. Raises ApiError."""

        def encode() -> list[int]:
            return self.codec.encode_chat(
                [message.for_template() for message in turns.messages],
                add_generation_prompt=turns.add_generation_prompt,
                continue_final_message=turns.continue_final_message,
                **turns.chat_template_kwargs,
            )

        size = sum(len(message.for_template()["content"]) for message in turns.messages)
        with refusing():
            return await self.encode(encode, size)

    async def completion_prompts(self, body: CompletionBody, client: EngineClient) -> list[Prompt]:
        """Each prompt with its parameters. Raises ApiError."""
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                prompt = await self.encode(lambda text=prompt: self.codec.encode(text), len(prompt))
            with refusing():
                prompts.append(self._prompt(body, client, prompt, "prompt"))
        return prompts

    def _prompt(
        self, body: ChatBody | CompletionBody, client: EngineClient, token_ids: list[int], name: str
    ) -> Prompt:
        check_prompt(token_ids, client.info, name)
        return Prompt(token_ids, sampling_params(body, self.defaults, client.info, len(token_ids)))

    async def encode(self, encode: Callable[[], T], num_chars: int) -> T:
        """What encode returns; a long text's off the event loop, one at a time."""
        if num_chars <= _INLINE_CHARS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
