"""What a reply must look like, as a grammar of llguidance's: JSON schemas, regexes, choices, Lark and GBNF.

Makes the string of SamplingParams.grammar and finds out, before a request is queued, whether it can be
followed. Knows a tokenizer; knows no request, no token that was drawn and no mask (worker/constraint.py). The
routes call it.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from ds_serve.text.codec import rust_tokenizer

MAX_CACHED = 256  # grammars whose check is remembered
_MAX_MESSAGE_CHARS = 400
_UNUSED_END = "<|ds_serve end|>"

# As json.dumps writes it, and no other white space: a small model at a high temperature would write blanks
# for ever.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What llguidance follows, and what says nothing of a value. It passes over any other word in silence.
_FOLLOWED = frozenset(
    "type enum const anyOf oneOf allOf $ref properties required additionalProperties patternProperties "
    "minProperties maxProperties items prefixItems additionalItems minItems maxItems minLength maxLength "
    "pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
)
_ANNOTATIONS = frozenset(
    "$schema $id id $anchor $comment $defs definitions title description default examples example deprecated "
    "readOnly writeOnly contentMediaType contentEncoding discriminator".split()
)
_SCHEMA_IN = frozenset("additionalProperties additionalItems items".split())
_SCHEMAS_IN = frozenset("anyOf oneOf allOf prefixItems items".split())
_NAMED_SCHEMAS_IN = frozenset("properties patternProperties $defs definitions".split())

_GBNF_RULE = re.compile(r"^\s*[A-Za-z][\w-]*\s*::=", re.M)
# A Lark rule's options that ask for more than a choice of tokens.
_LARK_OPTION = re.compile(r"^\s*[?!]?[A-Za-z_][\w-]*\[[^\]\n]*\b(temperature|stop|max_tokens)\b", re.M)


class GrammarError(ValueError):
    """A grammar that cannot be followed. The message begins with the parameter's name."""


class Grammars:
    """Grammars for one model's tokenizer. What was asked for before is remembered.

    tokenizer is transformers' or the tokenizers library's. Every method returns a string for
    SamplingParams.grammar; name is the parameter that a GrammarError begins with. A check takes about a
    millisecond, of a very large schema a few hundred. One thread at a time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._source = tokenizer
        self._cache: OrderedDict[tuple[str, str], str] = OrderedDict()

    def json_schema(self, schema: Any, name: str = "response_format") -> str:
        """JSON that validates against schema (an object, a boolean, or JSON text), in json.dumps' form."""
        if isinstance(schema, str):
            schema = _loads(schema, name)
        return self._once("json", _dumps(schema, name), name, lambda: _schema_grammar(schema, name))

    def regex(self, pattern: str, name: str = "guided_regex") -> str:
        """Text that the pattern matches as a whole. Rust's syntax, without look-around and references."""
        return self._once("regex", pattern, name, lambda: LLMatcher.grammar_from_regex(pattern))

    def choice(self, choices: Sequence[str], name: str = "guided_choice") -> str:
        """One of the given texts."""
        # A terminal, in upper case: one automaton for all of them, where rules would be tried one by one.
        lark = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))
        return self._once("lark", lark, name, lambda: lark)

    def lark(self, text: str, name: str = "guided_grammar") -> str:
        """A Lark grammar in llguidance's dialect; json_rule gives what may stand in one for a schema."""
        return self._once("lark", text, name, lambda: _checked_lark(text, name))

    def grammar(self, text: str, name: str = "guided_grammar") -> str:
        """A grammar in GBNF (rules by ::=, from "root") or in Lark (rules by a colon, from "start")."""
        if not _GBNF_RULE.search(text):
            return self.lark(text, name)
        try:
            lark = gbnf_to_lark(text)
        except Exception as error:  # a bare Exception for what it cannot convert
            raise _error(name, str(error)) from error
        return self.lark(lark, name)

    def _once(self, kind: str, asked: str, name: str, make: Callable[[], str]) -> str:
        key = (kind, asked)
        grammar = self._cache.get(key)
        if grammar is not None:
            self._cache.move_to_end(key)
            return grammar
        try:
            grammar = make()
        except GrammarError:
            raise
        except ValueError as error:
            raise _error(name, str(error)) from error
        self._check(grammar, name)
        self._cache[key] = grammar
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return grammar

    def _check(self, grammar: str, name: str) -> None:
        """Compiles the grammar, and looks whether it lets any first token through."""
        matcher = LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if not matcher.is_error():
            mask = np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.int32)
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_stopped() and not matcher.is_accepting():
                raise _error(name, "no text can follow it")
        if matcher.is_error():
            raise _error(name, matcher.get_error())

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return _make_tokenizer(self._source)


def json_rule(schema: Any, name: str) -> str:
    """What stands for JSON of this schema in a Lark rule: `%json {...}`. Raises GrammarError."""
    return "%json " + _dumps(_with_form(schema, name), name)


def _make_tokenizer(tokenizer: Any) -> LLTokenizer:
    """llguidance's view of a transformers tokenizer. Raises ValueError where it cannot take one."""
    backend = copy(rust_tokenizer(tokenizer))
    backend.no_padding()
    backend.no_truncation()
    # An end token of no request's, so that a grammar may spell the model's own: as in worker/constraint.py.
    backend.add_special_tokens([_UNUSED_END])
    end = backend.token_to_id(_UNUSED_END)
    return LLTokenizer(backend.to_str(), eos_token=end)


def _schema_grammar(schema: Any, name: str) -> str:
    return LLMatcher.grammar_from_json_schema(_with_form(schema, name))


def _with_form(schema: Any, name: str) -> dict[str, Any]:
    if schema is False:
        raise _error(name, "no JSON is valid against the schema false")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _error(name, f"a JSON schema must be an object or a boolean, got {type(schema).__name__}")
    _check_keywords(schema, name)
    return {"x-guidance": _JSON_FORM} | schema


def _check_keywords(schema: dict[str, Any], name: str) -> None:
    """Raises GrammarError for what llguidance would pass over."""
    left = [("", schema)]
    while left:
        path, node = left.pop()
        if not isinstance(node, dict):
            continue  # a boolean; of anything else llguidance says what it is
        for key, value in node.items():
            if key not in _FOLLOWED and key not in _ANNOTATIONS and not key.startswith("x-"):
                raise _error(name, f"the JSON schema's keyword {key!r} is not supported (in #{path})")
            here = f"{path}/{key}"
            if key == "x-guidance":
                raise _error(name, "the JSON schema's keyword 'x-guidance' is not supported")
            if key in _NAMED_SCHEMAS_IN and isinstance(value, dict):
                left += [(f"{here}/{each}", child) for each, child in value.items()]
            elif key in _SCHEMAS_IN and isinstance(value, list):
                left += [(f"{here}/{index}", child) for index, child in enumerate(value)]
            elif key in _SCHEMA_IN:
                left.append((here, value))
        _check_min_properties(path, node, name)
        _check_bounds(path, node, name)


def _check_min_properties(path: str, node: dict[str, Any], name: str) -> None:
    """llguidance counts a property twice that is written twice: of unnamed ones one at most may be needed."""
    least, required = node.get("minProperties", 0), node.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
        raise _error(
            name, f"minProperties: supported up to the number of required ones and 1 more (in #{path})"
        )


def _check_bounds(path: str, node: dict[str, Any], name: str) -> None:
    """llguidance lets an excluded whole number through where the other bound lies less than 1 from it."""
    if node.get("type") == "integer":
        return
    for key, others in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
    ):
        bound = node.get(key)
        for other in others:
            far = node.get(other)
            if not isinstance(bound, int | float) or not isinstance(far, int | float):
                continue
            if bound % 1 == 0 and 0 < abs(far - bound) < 1:
                raise _error(name, f"{key}: {bound} is not supported beside {other} {far} (in #{path})")


def _checked_lark(text: str, name: str) -> str:
    option = _LARK_OPTION.search(text)
    if option is not None:
        raise _error(name, f"the rule option {option[1]!r} is not supported")
    if text.lstrip().startswith("{"):  # llguidance's own JSON form, which may hold anything
        raise _error(name, "must be a grammar in Lark or GBNF")
    return text


def _loads(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(name, f"not the JSON text of a schema: {error}") from error


def _dumps(schema: Any, name: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(name, f"not a JSON schema: {error}") from error


def _error(name: str, message: str) -> GrammarError:
    text = " ".join(message.split("<non-verbose/>")[0].split())
    text = text.encode(errors="backslashreplace").decode()  # a schema's names may hold half a surrogate pair
    if len(text) > _MAX_MESSAGE_CHARS:
        text = text[:_MAX_MESSAGE_CHARS] + " ..."
    return GrammarError(f"{name}: {text}")
