"""Tool calls in a model's own words: which form its chat template uses, the grammar of it, and the parser.

A CallFormat is a form of writing calls; Calls, what one request may call, and whether it must. Its grammar
lets the model write nothing but such calls (and text before them, where it may answer in words), so the
parser meets no malformed ones. Knows no HTTP and no engine; the chat route calls it. Not known: forms that
are no JSON object with a name (see _REFUSED).
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import AddedToken

from ds_serve.text.detokenize import overlap
from ds_serve.text.grammar import json_rule

MAX_CALLS = 32  # in one answer

_ALPHANUMERIC = string.ascii_letters + string.digits


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _nine_characters() -> str:
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(frozen=True)
class CallFormat:
    """marker, opening, calls joined by between, closing; each call is {"name": NAME, key: ARGUMENTS}.

    marker tells calls from text; where it is empty, an answer that begins with a brace is a call. opening are
    forms that are all read, and the first where the model has no say. between is None where a message holds
    one call at most. marks are the parts that a tokenizer may have as tokens of their own; prelude is a
    token, never shown, that the model may write before all.
    """

    name: str
    signs: tuple[str, ...]  # all of them are in a chat template of this form
    key: str
    marker: str = ""
    opening: tuple[str, ...] = ("",)
    between: str | None = None
    closing: str = ""
    marks: tuple[str, ...] = ()
    prelude: str = ""
    new_id: Callable[[], str] = _call_id

    def head(self, function: str) -> str:
        """A call up to its arguments."""
        return f'{{"name": {json.dumps(function)}, "{self.key}": '


FORMATS = {
    format.name: format
    for format in (
        CallFormat(
            "hermes",
            signs=("<tool_call>",),
            key="arguments",
            marker="<tool_call>",
            opening=("\n",),
            between="\n</tool_call>\n<tool_call>\n",
            closing="\n</tool_call>",
            marks=("<tool_call>", "</tool_call>"),
        ),
        CallFormat(
            "mistral",
            signs=("[TOOL_CALLS]",),
            key="arguments",
            marker="[TOOL_CALLS]",
            opening=("[", " ["),
            between=", ",
            closing="]",
            marks=("[TOOL_CALLS]",),
            new_id=_nine_characters,  # its templates refuse others when a call comes back
        ),
        CallFormat("llama", signs=("ipython", '"parameters": '), key="parameters", prelude="<|python_tag|>"),
    )
}

_REFUSED = {  # sign -> whose form it is; some of these templates have signs of FORMATS too
    "<|channel|>": "harmony (gpt-oss)",
    "<function=": "XML functions (Qwen3-Coder)",
    "<arg_key>": "XML arguments (GLM)",
    "[ARGS]": "names before arguments (Mistral's newer one)",
    "<\uff5ctool": "DeepSeek's",
    "<|python_start|>": "Python calls (Llama 4)",
}

_OTHER_PROPERTIES = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}


def call_format(name: str, template: str) -> CallFormat:
    """The format of that name, or for "auto" the one whose signs are in the model's chat template.

    Raises ValueError (tools: ...) where the template has no place for tools, or writes calls in another form.
    """
    if not re.search(r"\btools\b", template):
        raise ValueError("tools: the model's chat template has no place for tools")
    if name != "auto":
        return FORMATS[name]
    for sign, form in _REFUSED.items():
        if sign in template:
            raise ValueError(f"tools: the model writes calls in a form that is not supported: {form}")
    for format in FORMATS.values():
        if all(sign in template for sign in format.signs):
            return format
    raise ValueError("tools: the chat template's form of calls is not known; tool_format may name one")


def arguments_rule(parameters: Mapping[str, Any] | None, name: str) -> str:
    """The rule of a function's arguments: an object that is valid against the schema parameters.

    A function takes what it names: where a plain list of properties does not speak of others, there are none.
    Raises ValueError, which begins with name, where the schema cannot be followed.
    """
    schema = {"type": "object", **({"properties": {}} if parameters is None else parameters)}
    if schema["type"] != "object":
        raise ValueError(f"{name}: must be the schema of an object, got the type {schema['type']!r}")
    if "properties" in schema and not schema.keys() & _OTHER_PROPERTIES:
        schema["additionalProperties"] = False
    return json_rule(schema, name)


@dataclass(frozen=True)
class CallPiece:
    """What call `index` of an answer gained. id and name come once, with its first piece."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Calls:
    """What an answer may call: functions are names with the rules (json_rule) of their arguments.

    required: it is calls and nothing else. parallel: it may be several, MAX_CALLS at most, for a small model
    finds no end by itself. added_tokens are the tokenizer's.
    """

    format: CallFormat
    functions: Mapping[str, str]
    required: bool
    parallel: bool
    added_tokens: Mapping[int, AddedToken]

    @property
    def skip_special_tokens(self) -> bool:
        """How the parser's text is to be decoded: marks must be seen, and the grammar allows no other."""
        return not any(t.special and t.content in self.format.marks for t in self.added_tokens.values())

    def parser(self) -> CallParser:
        """A parser for one answer."""
        return CallParser(self.format, self.functions)

    def grammar(self) -> str:
        """The answers that are allowed, in llguidance's Lark.

        Free text has no marker in it and ends where calls begin; after them comes nothing. It may hold those
        added tokens that are no special ones (a model's thoughts are between such), by their ids.
        """
        opening = " | ".join(f"({self._literal(form)})" for form in self.format.opening if form)
        opening = f"({opening})" if opening else ""
        rules = [f"calls: {opening} call {self._more()} {self._literal(self.format.closing)}"]
        rules += [f"call: {' | '.join(f'call_{i}' for i in range(len(self.functions)))}"]
        for i, (name, arguments) in enumerate(self.functions.items()):
            rules += [f'call_{i}: {json.dumps(self.format.head(name))} {arguments} "}}"']
        start = self._must() if self.required else self._may()
        return "\n".join([*start, *rules])

    def _must(self) -> list[str]:
        return [f"start: {self._begin()} calls"]

    def _may(self) -> list[str]:
        others = self._other_tokens()
        text = f"(TEXT {others})*" if others else ""
        any_text = "ANY: /(?s:.*)/"
        if not self.format.marker:
            rest = f"({others} ANY)*" if others else ""
            return [
                f"start: TEXT {rest} | {self._begin()} calls",
                r"TEXT: /([^{](?s:.*))?/",
                *([any_text] if others else []),
            ]
        marker = json.dumps(self.format.marker)
        terminals = [any_text, f"TEXT: ANY & ~(ANY {marker} ANY)"]
        if self._token(self.format.marker) is not None:
            return [f"start: {text} TEXT ({self._begin()} calls)?", *terminals]
        return [f"start: {text} (TEXT | begin calls)", f"begin[lazy]: ANY {marker}", *terminals]

    def _more(self) -> str:
        if not self.parallel or self.format.between is None:
            return ""
        return f"({self._literal(self.format.between)} call){{0,{MAX_CALLS - 1}}}"

    def _begin(self) -> str:
        prelude = self._token(self.format.prelude)
        marker = self._literal(self.format.marker) if self.format.marker else ""
        return marker if prelude is None else f"<[{prelude}]>? {marker}"

    def _literal(self, text: str) -> str:
        """text as a sequence of strings, and of ids where a mark is a token."""
        marks = "|".join(map(re.escape, self.format.marks))
        parts = [part for part in re.split(f"({marks})", text) if part] if marks else [text]
        ids = [self._token(part) for part in parts]
        return " ".join(
            json.dumps(part) if id is None else f"<[{id}]>" for part, id in zip(parts, ids, strict=True)
        )

    def _token(self, text: str) -> int | None:
        return next((id for id, token in self.added_tokens.items() if token.content == text), None)

    def _other_tokens(self) -> str:
        """The added tokens that free text may hold."""
        ids = [
            id for id, t in self.added_tokens.items() if not t.special and t.content not in self.format.marks
        ]
        return f"<[{','.join(map(str, ids))}]>" if ids else ""


class CallParser:
    """One answer's text, taken apart as it comes: the joined events do not depend on where it was cut.

    num_calls: calls begun. complete: there are calls, and the last one's arguments have ended.
    """

    def __init__(self, format: CallFormat, functions: Sequence[str]) -> None:
        self.num_calls = 0
        self._format = format
        self._first = {form + format.head(name): name for form in format.opening for name in functions}
        self._next = {}
        if format.between is not None:
            self._next = {f"}}{format.between}{format.head(name)}": name for name in functions}
        self._read = self._text if format.marker else self._beginning
        self._held = ""
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def complete(self) -> bool:
        return self._read == self._after

    def push(self, text: str, final: bool = False) -> list[str | CallPiece]:
        """The events that text completes: content, and pieces of calls, each call's in one.

        final: nothing more comes. White space before a call is dropped, and so is a call cut off in its name.
        """
        self._held += text
        events: list[str | CallPiece] = []
        read = None
        while read != self._read:  # a reader that stays has taken what it can
            read = self._read
            events += read(final)
        return _joined(events)

    def _text(self, final: bool) -> list[str]:
        marker = self._format.marker
        before, found, after = self._held.partition(marker)
        if found:
            self._read, self._held = self._head, after
            return [before.rstrip()] if before.strip() else []
        return self._show(len(before) if final else len(before[: -overlap(before, marker) or None].rstrip()))

    def _beginning(self, final: bool) -> list[str]:
        if self._held:
            self._read = self._head if self._held.startswith("{") else self._rest
        return []

    def _rest(self, final: bool) -> list[str]:
        return self._show(len(self._held))

    def _show(self, size: int) -> list[str]:
        shown, self._held = self._held[:size], self._held[size:]
        return [shown] if shown else []

    def _head(self, final: bool) -> list[str | CallPiece]:
        return self._call(self._first)

    def _after(self, final: bool) -> list[CallPiece]:
        return self._call(self._next)

    def _call(self, heads: Mapping[str, str]) -> list[CallPiece]:
        """The start of a call, where a whole head is there."""
        for head, name in heads.items():
            if self._held.startswith(head):
                self._held = self._held[len(head) :]
                self._read = self._arguments
                self.num_calls += 1
                return [CallPiece(self.num_calls - 1, id=self._format.new_id(), name=name)]
        return []

    def _arguments(self, final: bool) -> list[CallPiece]:
        size = self._object_end()
        if size is None:
            size = len(self._held)
        else:
            self._read = self._after
        arguments = "".join(self._show(size))
        return [CallPiece(self.num_calls - 1, arguments)] if arguments else []

    def _object_end(self) -> int | None:
        """How much of what is held belongs to the object of the arguments, if it ends there."""
        for at, character in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


def _joined(events: Sequence[str | CallPiece]) -> list[str | CallPiece]:
    joined: list[str | CallPiece] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, CallPiece) and isinstance(last, CallPiece) and last.index == event.index:
            joined[-1] = replace(last, arguments=last.arguments + event.arguments)
        else:
            joined.append(event)
    return joined
