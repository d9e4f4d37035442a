"""The body of /v1/chat/completions: messages of a chat, beside what every generating route takes.

Knows shapes and types; what a template makes of the messages is text/codec.py's. See protocol.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ds_serve.server.protocol import Body, ChoicesBody, Text


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn. Content of several text parts is joined by newlines."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content_is_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            kinds = [part.get("type") if isinstance(part, dict) else part for part in value]
            if any(kind != "text" for kind in kinds):
                raise ValueError(f"parts must be of type 'text', got {kinds}")
        elif not isinstance(value, str):
            raise ValueError("must be a string or a list of text parts")
        return value

    def for_template(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        message = {"role": self.role, "content": content}
        return message | ({"name": self.name} if self.name is not None else {})


class Turns(Body):
    """A chat as its template gets it: what makes the prompt, and nothing else."""

    messages: list[Message] = Field(min_length=1)
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = Field(
        None, description="opens the assistant's turn; default: unless continue_final_message"
    )
    continue_final_message: bool = False


class ChatBody(Turns, ChoicesBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only where logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: differs from max_completion_tokens, its newer name; send one")
        return self

    @property
    def max_tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
