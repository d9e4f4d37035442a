"""The replies of OpenAI's older routes, and of our own, as the OpenAPI document tells them.

Nothing is built from these models, nor checked: the routes word their replies (completions.py, chat.py), and
tests hold them to these. responses_reply.py has those of /v1/responses.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class PromptTokensDetails(_Reply):
    """host_cached_tokens, our own field, are those of cached_tokens that came from CPU memory."""

    cached_tokens: int
    host_cached_tokens: int


class TokenUsage(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Reply):
    """By token. The first token of an echoed prompt follows nothing, and has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionReply(_Reply):
    """n choices for each prompt, in the prompts' order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage


class ChatTopLogprob(_Reply):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(_Reply):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatCalledFunction(_Reply):
    name: str
    arguments: str


class ChatToolCall(_Reply):
    id: str
    type: Literal["function"]
    function: ChatCalledFunction


class ChatMessage(_Reply):
    """content is null where there are tool_calls and no text; without calls there are no tool_calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ChatToolCall] = []


class ChatChoice(_Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatReply(_Reply):
    """n choices."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ModelCard(_Reply):
    """parent, our own field, is the model that a LoRA adapter changes; null for the model itself."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["ds_serve"]
    max_model_len: int
    parent: str | None


class ModelList(_Reply):
    object: Literal["list"]
    data: list[ModelCard]


class HealthReply(_Reply):
    """engine is what it serves, stats its accounts since its start, null where it is busy for a second."""

    status: Literal["ok"]
    engine: dict[str, Any]
    stats: dict[str, Any] | None


class ReadyReply(_Reply):
    status: Literal["ready"]


class VersionReply(_Reply):
    version: str


class ErrorDetails(_Reply):
    """param is the parameter at fault, code a word for the kind of error; null where there is none."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(_Reply):
    """OpenAI's shape of an error."""

    error: ErrorDetails


def _streamed(model: type[BaseModel], chunk: str) -> dict:
    return {
        200: {
            "model": model,
            "description": "The whole reply. Where stream is true, its pieces as server-sent events: "
            f"{chunk} objects and, at the end, [DONE]. An error in the middle is an event with an error.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }


COMPLETION = _streamed(CompletionReply, "text_completion")
CHAT = _streamed(ChatReply, "chat.completion.chunk")
METRICS = {
    200: {
        "description": "Prometheus' text format, or OpenMetrics'.",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "application/openmetrics-text": {"schema": {"type": "string"}},
        },
    }
}
