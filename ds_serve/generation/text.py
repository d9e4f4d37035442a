"""Inputs of the pipeline to token ids, and its results to text or chats, as transformers does it.

Follows TextGenerationPipeline.preprocess and postprocess (transformers 5.23). Knows a tokenizer,
no engine and no sampling; pipeline.py calls it.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_serve.generation.args import FULL_TEXT, MAX_NEW_TOKENS_WITHOUT_LIMIT, GenerateArgs

Input = str | list  # a prompt, or a chat: a list of messages with "role" and "content"


@dataclass(frozen=True)
class Prompt:
    """An encoded input. num_hidden counts its ids that are no part of the input (BOS for an empty one)."""

    value: Input
    token_ids: list[int]
    prefix_length: int = 0
    num_hidden: int = 0


class Texts:
    """Encodes and decodes for calls from several threads: the tokenizer may change while it encodes."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.lock = threading.Lock()
        self._structured = getattr(tokenizer, "response_template", None) is not None

    def inputs(self, text_inputs: Any) -> tuple[Iterable[Input], bool]:
        """(inputs, whether there is only one). A generator or a dataset stays lazy, a list does not."""
        if isinstance(text_inputs, str):
            return [text_inputs], True
        if isinstance(text_inputs, (list, tuple)):
            if text_inputs and _is_message(text_inputs[0]):
                return [_checked(list(text_inputs))], True
            return [_checked(item) for item in text_inputs], False
        if isinstance(text_inputs, types.GeneratorType) or _is_dataset(text_inputs):
            return _lazy(iter(text_inputs)), False
        raise TypeError(
            f"text_inputs: must be a string, a chat, or several of them, got {type(text_inputs).__name__}"
        )

    def check(self, encode: Mapping[str, Any]) -> None:
        """Raises ValueError for a value of an encoding argument that is not offered."""
        if encode.get("padding") not in (None, False, True, "longest", "do_not_pad"):
            raise ValueError(f"padding: a prompt is never padded here, got {encode['padding']!r}")
        if encode.get("handle_long_generation") not in (None, "hole"):
            raise ValueError(
                f"handle_long_generation: must be None or 'hole', got {encode['handle_long_generation']!r}"
            )
        forbidden = {"return_tensors", "return_dict", "tokenize", "padding"} & set(
            encode.get("tokenizer_encode_kwargs") or {}
        )
        if forbidden:
            raise ValueError(f"tokenizer_encode_kwargs: {sorted(forbidden)[0]} cannot be set")

    def encode(
        self, value: Input, arguments: Mapping[str, Any], generate: GenerateArgs, *, answer: bool = True
    ) -> Prompt:
        """With answer=False a prompt that others go on from: no generation prompt, and nothing is cut off.

        Raises ValueError where the prompt is empty and the model has no BOS, or the template refuses.
        """
        names = ("add_special_tokens", "truncation", "max_length")
        options = {name: arguments[name] for name in names if name in arguments}
        if not options.get("truncation"):
            options.pop("max_length", None)  # it bounds the whole text then, and means nothing here
        options.update(arguments.get("tokenizer_encode_kwargs") or {})
        prefix, prefix_length = arguments.get("prefix") or "", 0
        with self.lock:
            if isinstance(value, str):
                token_ids = list(self.tokenizer(prefix + value, verbose=False, **options)["input_ids"])
            else:
                token_ids = self._encode_chat(value, arguments, options, answer)
            if prefix:
                added = bool(arguments.get("add_special_tokens"))
                prefix_length = len(self.tokenizer(prefix, add_special_tokens=added)["input_ids"])
        if answer and arguments.get("handle_long_generation") == "hole":
            token_ids = self._cut_hole(token_ids, generate)
        if token_ids:
            return Prompt(value, token_ids, prefix_length)
        bos = generate.fields.get("bos_token_id")
        if bos is None:
            raise ValueError("text_inputs: an empty prompt, and the model has no bos_token_id to start from")
        return Prompt(value, [bos], prefix_length, num_hidden=1)

    def _encode_chat(
        self, chat: list, arguments: Mapping[str, Any], options: dict[str, Any], answer: bool
    ) -> list[int]:
        options.pop("add_special_tokens", None)  # the template writes them
        open_end = _continues(chat, arguments) if answer else bool(arguments.get("continue_final_message"))
        ids = self.tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=answer and not open_end,
            continue_final_message=open_end,
            tools=arguments.get("tools"),
            documents=arguments.get("documents"),
            tokenize=True,
            return_dict=False,
            **options,
        )
        return list(ids)

    def _cut_hole(self, token_ids: list[int], generate: GenerateArgs) -> list[int]:
        """Drops the beginning, so that prompt and new tokens fit the tokenizer's model_max_length."""
        new = generate.fields.get("max_new_tokens")
        if new is None:
            longest = generate.fields.get("max_length")
            new = MAX_NEW_TOKENS_WITHOUT_LIMIT if longest is None else longest - len(token_ids)
        keep = self.tokenizer.model_max_length - new
        if new < 0 or keep <= 0:
            raise ValueError(
                f"handle_long_generation: {new} new tokens leave nothing of the model's"
                f" {self.tokenizer.model_max_length} to the prompt"
            )
        return token_ids[-keep:]

    def decode(self, prompt: Prompt, token_ids: list[int], skip_special: bool, clean_up: bool | None) -> str:
        """The text of new tokens alone, by the tokenizer's own decode."""
        if self._structured:  # parse_response needs the markers
            skip_special = False
        return self._decode(prompt.token_ids[: prompt.num_hidden] + token_ids, skip_special, clean_up)

    def _decode(self, token_ids: list[int], skip_special: bool, clean_up: bool | None) -> str:
        with self.lock:
            return self.tokenizer.decode(
                token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=clean_up
            )

    def answer(self, prompt: Prompt, text: str, returns: str, arguments: Mapping[str, Any]) -> Any:
        """What generated_text holds: the new text, the whole text, or the chat with its new message."""
        if returns != FULL_TEXT:
            return text
        if isinstance(prompt.value, str):
            return prompt.value + text
        chat = list(prompt.value)
        if _continues(chat, arguments):
            last = chat[-1]
            return [*chat[:-1], {"role": last["role"], "content": last["content"] + text}]
        if not self._structured:
            return [*chat, {"role": "assistant", "content": text}]
        before = self._decode(prompt.token_ids[prompt.num_hidden :], False, None)
        return [*chat, self.tokenizer.parse_response(text, prefix=before, tools=arguments.get("tools"))]


def _continues(chat: list, arguments: Mapping[str, Any]) -> bool:
    """Whether the last message is left open: asked for, or it is the assistant's own."""
    chosen = arguments.get("continue_final_message")
    return chat[-1]["role"] == "assistant" if chosen is None else bool(chosen)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


def _is_dataset(value: Any) -> bool:
    """torch's and datasets' kind: indexable, sized, and no mapping."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, Mapping)


def _checked(value: Any) -> Input:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(map(_is_message, value)):
        return list(value)
    if isinstance(value, (list, tuple)) and value and _is_message(value[0]):
        raise ValueError("text_inputs: each message of a chat must have 'role' and 'content'")
    raise TypeError(f"text_inputs: must be strings or chats, got {value!r:.80}")


def _lazy(values: Iterator[Any]) -> Iterator[Input]:
    return (_checked(value) for value in values)
