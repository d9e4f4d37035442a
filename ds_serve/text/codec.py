"""A model's tokenizer: text and chats to token ids, token ids to text.

Knows nothing of requests or streams (see detokenize.py) nor of which ids end a request (see
defaults.py). The server and the pipeline hold one codec each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

ROLES = ("system", "developer", "user", "assistant", "tool")

_NO_ID = 2**32  # the backend takes 32 bits
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class NoChatTemplateError(ValueError):
    """The model's tokenizer has no chat template."""


class SlowTokenizerError(ValueError):
    """The model's tokenizer is not backed by the tokenizers library."""


def rust_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizers.Tokenizer within a transformers tokenizer (or the one given).

    Raises SlowTokenizerError where there is none: incremental decoding needs it.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise SlowTokenizerError(
            f"tokenizer: {type(tokenizer).__name__} has no tokenizers backend; "
            "convert it to a tokenizer.json (a 'fast' tokenizer) first"
        )
    return backend


class TextCodec:
    """Encodes and decodes as transformers does for the model in model_dir (local files only).

    Raises FileNotFoundError where model_dir is no folder, SlowTokenizerError where the tokenizer
    has no tokenizers backend, and what transformers raises for unreadable tokenizer files.
    """

    def __init__(self, model_dir: str | Path, *, trust_remote_code: bool = False) -> None:
        folder = Path(model_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"model: {folder} is not a folder with tokenizer files")
        from transformers import AutoTokenizer  # here, because it imports torch: seconds, and 300 MB

        self.tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
        self.backend = rust_tokenizer(self.tokenizer)
        # The first call may set the backend's truncation and padding; after it, encoding mutates
        # nothing, so another thread may decode meanwhile.
        self.encode("")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of text, with the special tokens the tokenizer adds on its own (BOS, for many).

        Raises ValueError where text holds half of a surrogate pair.
        """
        try:
            ids = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        except TypeError as error:  # so the backend calls a str that UTF-8 cannot hold
            raise ValueError(f"prompt: cannot be encoded: {error}") from error
        return list(ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids of a chat, rendered by the model's chat template, which writes BOS itself.

        add_generation_prompt opens an assistant's turn; it is on unless continue_final_message,
        which leaves the last message open instead. template_kwargs are the template's variables.
        Raises NoChatTemplateError, or ValueError where the messages or variables do not suit.
        """
        if not self.has_chat_template:
            raise NoChatTemplateError(
                "messages: the model's tokenizer has no chat template; send a prompt to completions instead"
            )
        _check_messages(messages)
        reserved = sorted(self._reserved & template_kwargs.keys())
        if reserved:
            raise ValueError(f"chat_template_kwargs: {reserved[0]!r} is not a template variable")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message: excludes add_generation_prompt")
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=True,
                return_dict=False,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"messages: the chat template refused them: {error}") from error
        return list(ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token_ids, exactly as the backend decodes it (no clean-up of spaces)."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each id. Raises ValueError where one is not in it."""
        pieces = []
        for token_id in token_ids:
            piece = self.backend.id_to_token(token_id) if 0 <= token_id < _NO_ID else None
            if piece is None:
                raise ValueError(f"tokens: id {token_id} is not in the tokenizer's vocabulary")
            pieces.append(piece)
        return pieces

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, its leading space and incomplete characters included."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:  # a vocabulary padded beyond the tokenizer's
            return b""
        if token_id in self.added_tokens:
            return piece.encode()
        if self._is_byte_level:
            return _from_byte_level(piece)
        match = _BYTE_TOKEN.fullmatch(piece)
        return bytes.fromhex(match[1]) if match else piece.replace("\u2581", " ").encode()

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def tools_template(self) -> str:
        """The chat template for chats with tools; "" where the model has no chat template."""
        return self.tokenizer.get_chat_template(tools=[]) if self.has_chat_template else ""

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """By their ids, the tokens that stand for a text of their own beside the vocabulary's pieces."""
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def _reserved(self) -> frozenset[str]:
        """What template variables may not be named: it steers apply_chat_template itself."""
        parameters = inspect.signature(self.tokenizer.apply_chat_template).parameters
        return frozenset(parameters) - {"documents"}

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ValueError("messages: must hold at least one message")
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{index}].role: must be one of {', '.join(ROLES)}, got {role!r}")


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of byte-level BPE (GPT-2, Radford et al. 2019).

    Printable Latin-1 bytes stand for themselves; the others, in order, for U+0100 onwards.
    """
    own = [c for c in range(256) if chr(c) in set(ByteLevel.alphabet())]
    others = [c for c in range(256) if c not in own]
    return {chr(c): c for c in own} | {chr(256 + i): c for i, c in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _from_byte_level(piece: str) -> bytes:
    if all(character in _BYTE_LEVEL for character in piece):
        return bytes(_BYTE_LEVEL[character] for character in piece)
    return piece.encode()
