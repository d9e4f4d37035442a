"""What the bodies of OpenAI's generating routes share, and the body of /v1/completions, as pydantic models.

Knows shapes and types; ranges of sampling parameters are SamplingParams' own (messages.py). A
field that is not here is refused; null is the same as absent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024  # each; the search for a beginning of one grows with its square
MAX_CACHE_KEY_CHARS = 256
MAX_DEPTH = 100  # of a JSON value that goes on to a template or a grammar


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, has an unpaired surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def shallow(value: Any) -> Any:
    """Raises ValueError for JSON so deep that a library, or its recursion, would give up on it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, list | dict)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return value
    raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")


JsonObject = Annotated[dict[str, Any], AfterValidator(shallow)]


_STRING = {"type": "string", "minLength": 1}
_STOP = {
    "anyOf": [
        _STRING | {"maxLength": MAX_STOP_CHARS},
        {"type": "array", "items": _STRING | {"maxLength": MAX_STOP_CHARS}, "maxItems": MAX_STOP_STRINGS},
    ]
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}


def _nulls_are_told(schema: dict[str, Any]) -> None:
    """Writes into a body's schema that what may be left out may be null."""
    for name in schema.get("properties", {}).keys() - set(schema.get("required", ())):
        field, null = schema["properties"][name], {"type": "null"}
        if null in field.get("anyOf", ()):
            continue
        if "type" in field and not {"const", "enum"} & field.keys():
            field["type"] = [field["type"], "null"]
        else:
            around = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            members = field["anyOf"] if field.keys() == {"anyOf"} else [field]
            schema["properties"][name] = around | {"anyOf": [*members, null]}


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), json_schema_extra=_nulls_are_told
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class AccountFields(Body):
    """What clients say of their account with OpenAI, taken where it asks for what is so anyway."""

    store: Literal[False] = Field(False, description="nothing is stored")
    service_tier: Literal["auto", "default"] | None = Field(None, description="there is one: default")
    safety_identifier: Text | None = Field(None, max_length=128, description="informational only")


class JsonSchema(Body):
    """A schema as OpenAI's clients send it. Output follows it, whatever strict says."""

    schema_: dict[str, Any] | bool = Field(alias="schema")
    name: Text = ""
    description: Text = ""
    strict: bool = True


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("must have json_schema where type is 'json_schema', and only there")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | bool | None:
        """What output must validate against; None: it is free."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class StructuredOutputs(Body):
    """vLLM's newer spelling of the guided_ fields: one of them."""

    json_: dict[str, Any] | bool | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = Field(None, min_length=1)
    grammar: Text | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("must have one of json, regex, choice and grammar")
        return self


class Form(NamedTuple):
    """What output must look like. name is the parameter that asked for it, kind a method of Grammars."""

    name: str
    kind: Literal["json_schema", "regex", "choice", "grammar"]
    value: Any


class GenerationBody(Body):
    """What every generating route takes. Fields after `user` are extensions, named as elsewhere."""

    model: Text
    stream: bool = False
    stop: Annotated[list[Text], WithJsonSchema(_STOP)] = []
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    user: Text | None = Field(None, description="informational only")

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    priority: int = 0
    cache_salt: Text = Field("", description="prompts find cached prefixes of their own salt only")
    prompt_cache_key: Text = Field(
        "",
        max_length=MAX_CACHE_KEY_CHARS,
        description="Keeps the prompt's full KV blocks on the device until prompt_cache_ttl has passed since "
        "the key's last use. A newer prompt under the same key and cache_salt takes its place; of several "
        "prompts in one call the last to be computed stays. A hint: kept blocks are bounded, and what would "
        "expire first gives way. Prefixes are found without it, whatever the keys, and it routes nothing.",
    )
    prompt_cache_ttl: float = Field(
        300.0, ge=1, le=86400, description="seconds; only where prompt_cache_key is given"
    )

    guided_json: dict[str, Any] | bool | Text | None = Field(None, description="a JSON schema, or its text")
    guided_regex: Text | None = Field(None, description="matches the whole output; Rust's syntax")
    guided_choice: list[Text] | None = Field(None, min_length=1, description="the output is one of these")
    guided_grammar: Text | None = Field(None, description="in GBNF, or in llguidance's dialect of Lark")
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        strings = [value] if isinstance(value, str) else value
        if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
            raise ValueError("must be a non-empty string or a list of such")
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"must hold at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
        if any(len(s) > MAX_STOP_CHARS for s in strings):
            raise ValueError(f"each must have at most {MAX_STOP_CHARS} characters")
        return strings

    @model_validator(mode="after")
    def _time_needs_a_key(self) -> GenerationBody:
        if "prompt_cache_ttl" in self.model_fields_set and not self.prompt_cache_key:
            raise ValueError("prompt_cache_ttl: only where prompt_cache_key is given")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> GenerationBody:
        forms = self._forms()
        if len(forms) > 1:
            raise ValueError(f"{forms[1].name}: not beside {forms[0].name}; send one of them")
        return self

    @property
    def form(self) -> Form | None:
        """What output must look like, or None where it is free."""
        return next(iter(self._forms()), None)

    def _forms(self) -> list[Form]:
        forms = [
            Form("guided_json", "json_schema", self.guided_json),
            Form("guided_regex", "regex", self.guided_regex),
            Form("guided_choice", "choice", self.guided_choice),
            Form("guided_grammar", "grammar", self.guided_grammar),
        ]
        if (newer := self.structured_outputs) is not None:
            forms += [
                Form("structured_outputs", "json_schema", newer.json_),
                Form("structured_outputs", "regex", newer.regex),
                Form("structured_outputs", "choice", newer.choice),
                Form("structured_outputs", "grammar", newer.grammar),
            ]
        return [form for form in forms if form.value is not None]


class ChoicesBody(GenerationBody):
    """What the routes that answer with choices share beside it: chat and completions."""

    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = None
    response_format: ResponseFormat | None = Field(
        None,
        description="json_object and json_schema: output is JSON as json.dumps writes it, that validates",
    )

    def _forms(self) -> list[Form]:
        schema = None if self.response_format is None else self.response_format.schema_asked
        own = [] if schema is None else [Form("response_format", "json_schema", schema)]
        return own + super()._forms()

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> ChoicesBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where stream is true")
        return self


class CompletionBody(ChoicesBody):
    """POST /v1/completions. prompt becomes a list of texts or of token ids."""

    prompt: Annotated[list[Text] | list[list[int]], WithJsonSchema(_PROMPT)]
    logprobs: int | None = None
    best_of: int | None = Field(None, description="n: none are made beside those that are returned")
    echo: bool = Field(
        False, description="begin each text with its prompt; with logprobs also those of the prompt's tokens"
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt_as_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if _are_ids(value):
                return [value]
            if all(isinstance(item, str) for item in value) or all(map(_are_ids, value)):
                return value
        raise ValueError("must be a string, token ids, or a non-empty list of either")

    @model_validator(mode="after")
    def _all_are_returned(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: must be n ({self.n}), got {self.best_of}")
        return self

    @model_validator(mode="after")
    def _echo_goes_with_the_rest(self) -> CompletionBody:
        if self.without_output and not self.echo:
            raise ValueError("max_tokens: must be at least 1 where echo is false")
        if self.prompt_logprobs is not None and self.prompt_cache_key:
            raise ValueError("prompt_cache_key: a prompt whose logprobs are asked for is not cached")
        return self

    @property
    def without_output(self) -> bool:
        """Whether the prompt alone is asked for."""
        return self.max_tokens == 0

    @property
    def prompt_logprobs(self) -> int | None:
        """Alternatives to report for each token of the prompt; None: nothing is asked for."""
        return self.logprobs if self.echo else None

    @property
    def max_tokens_asked(self) -> int | None:
        return self.max_tokens


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
