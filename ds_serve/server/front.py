"""What the routes share: the model's name, its codec and defaults, and the way to its engine.

Knows no routes. run.py makes one; app.py hands it to every route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from ds_serve.server.chat_protocol import ChatBody, Turns
from ds_serve.server.client import EngineClient, EngineDeadError
from ds_serve.server.errors import ApiError, refusing
from ds_serve.server.gate import Door
from ds_serve.server.generation import Prompt
from ds_serve.server.metrics import Metrics
from ds_serve.server.protocol import CompletionBody, Form
from ds_serve.server.sampling import check_prompt, sampling_params
from ds_serve.text.codec import TextCodec
from ds_serve.text.defaults import GenerationDefaults
from ds_serve.text.grammar import Grammars
from ds_serve.text.tools import CallFormat, Calls, call_format

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
    """codec is None until the tokenizer is loaded; created is the model's time stamp in the API.

    adapters are names of LoRA adapters, each served as a model beside the model itself.
    """

    model_name: str
    defaults: GenerationDefaults
    backend: Backend
    created: int
    codec: TextCodec | None = None
    adapters: tuple[str, ...] = ()
    door: Door = field(default_factory=Door)
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing | None = None
    tool_format: str = "auto"
    # One thread: the tokenizer must not be encoding twice at once.
    _encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encode"))
    # A thread of its own: the check of a large grammar takes as long as many prompts.
    _grammarian: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammar"))
    _grammars: Grammars | None = None

    @property
    def client(self) -> EngineClient:
        """The engine's client. Raises EngineDeadError until engine and tokenizer are both there."""
        client = self.backend.client
        if self.codec is None:
            raise EngineDeadError("the tokenizer is loading")
        return client

    @property
    def model_names(self) -> list[str]:
        """Every name that a request may give as its model: the model's own, then the adapters'."""
        return [self.model_name, *self.adapters]

    def adapter_of(self, name: str) -> str:
        """The adapter that a request's model stands for, "" for the model itself. Raises ApiError 404."""
        if name not in self.model_names:
            served = f"{', '.join(map(repr, self.model_names))} {'are' if self.adapters else 'is'}"
            raise ApiError(
                404,
                f"model: {name!r} is not served here; {served}",
                param="model",
                code="model_not_found",
            )
        return name if name in self.adapters else ""

    def call_format(self) -> CallFormat:
        """How the model writes calls. Raises ApiError where it knows no tools, or in a form unknown here."""
        with refusing():
            return call_format(self.tool_format, self.codec.tools_template)

    async def chat_prompt(self, body: ChatBody, client: EngineClient, calls: Calls | None = None) -> Prompt:
        """The rendered chat with its parameters; calls: what the answer may call. Raises ApiError."""
        token_ids = await self.encode_chat(body)
        if calls is None:
            grammar = await self.grammar(body.form)
        else:
            grammar = await self.make_grammar(lambda grammars: grammars.lark(calls.grammar(), "tools"))
        with refusing():
            prompt = self._prompt(body, client, token_ids, "messages", grammar)
        return prompt if calls is None else replace(prompt, skip_special_tokens=calls.skip_special_tokens)

    async def encode_chat(self, turns: Turns) -> list[int]:
        """The ids of a rendered chat. Raises ApiError."""

        messages, tools = turns.messages_for_template(), turns.tools_for_template()
        size = sum(len(message["content"]) for message in messages)
        if tools or any("tool_calls" in message for message in messages):
            self.call_format()  # refuses what a template would pass over
            size += len(str(tools)) + sum(len(str(message.get("tool_calls", ""))) for message in messages)

        def encode() -> list[int]:
            return self.codec.encode_chat(
                messages,
                tools=tools,
                add_generation_prompt=turns.add_generation_prompt,
                continue_final_message=turns.continue_final_message,
                **turns.chat_template_kwargs,
            )

        with refusing():
            return await self.encode(encode, size)

    async def completion_prompts(self, body: CompletionBody, client: EngineClient) -> list[Prompt]:
        """Each prompt with its parameters. Raises ApiError."""
        prompts = []
        grammar = await self.grammar(body.form)
        for prompt in body.prompt:
            if isinstance(prompt, str):
                prompt = await self.encode(lambda text=prompt: self.codec.encode(text), len(prompt))
            with refusing():
                prompts.append(self._prompt(body, client, prompt, "prompt", grammar))
        return prompts

    async def grammar(self, form: Form | None) -> str:
        """The grammar of a form, "" for None. Raises ApiError."""
        if form is None:
            return ""
        name, kind, value = form
        return await self.make_grammar(lambda grammars: getattr(grammars, kind)(value, name))

    async def make_grammar(self, make: Callable[[Grammars], str]) -> str:
        """What make makes of this model's Grammars, off the event loop, one at a time. Raises ApiError."""

        def work() -> str:
            if self._grammars is None:
                self._grammars = Grammars(self.codec.tokenizer)
            return make(self._grammars)

        with refusing():
            return await asyncio.get_running_loop().run_in_executor(self._grammarian, work)

    def _prompt(
        self,
        body: ChatBody | CompletionBody,
        client: EngineClient,
        token_ids: list[int],
        name: str,
        grammar: str,
    ) -> Prompt:
        check_prompt(token_ids, client.info, name)
        return Prompt(token_ids, sampling_params(body, self.defaults, client.info, len(token_ids), grammar))

    async def encode(self, encode: Callable[[], T], num_chars: int) -> T:
        """What encode returns; a long text's off the event loop, one at a time."""
        if num_chars <= _INLINE_CHARS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
