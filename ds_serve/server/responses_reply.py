"""The reply of /v1/responses as the OpenAPI document tells it.

Nothing is built from these models, nor checked: responses.py words the reply, and tests hold it to them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ds_serve.server.responses_protocol import FunctionTool, TextOptions, ToolChoice

Status = Literal["in_progress", "completed", "incomplete"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TopLogprob(_Reply):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class OutputText(_Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class OutputMessage(_Reply):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(_Reply):
    """call_id is what the function_call_output of the next call names."""

    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(_Reply):
    """host_cached_tokens, our own field, are those of cached_tokens that came from CPU memory."""

    cached_tokens: int
    host_cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(_Reply):
    reasoning_tokens: Literal[0]


class Usage(_Reply):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Failure(_Reply):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(_Reply):
    reason: Literal["max_output_tokens"]


class ResponseReply(_Reply):
    """A response. temperature and top_p are those that were used; usage is null until the end."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: Failure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | OutputCall]
    usage: Usage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    safety_identifier: str | None
    tool_choice: ToolChoice
    tools: list[FunctionTool]
    user: str | None
    text: TextOptions
    temperature: float
    top_p: float
    top_logprobs: int
    prompt_cache_key: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    background: Literal[False]
    truncation: Literal["disabled"]
    previous_response_id: None


DOCUMENTED = {
    200: {
        "model": ResponseReply,
        "description": "The response. Where stream is true, its events with type and sequence_number: "
        "the first is response.created, the last response.completed, response.incomplete or response.failed.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
