"""What a call of the pipeline asks for: transformers' arguments and our own, merged and checked.

Names, defaults and precedence are those of transformers' text-generation pipeline (5.23:
TextGenerationPipeline._sanitize_parameters, Pipeline._prepare_generate_kwargs and
GenerationMixin._prepare_generation_config). Every argument is used, or refused by name. Knows no
tokenizer and no engine; pipeline.py calls it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_serve.messages import SamplingParams, sibling_seed

ENCODE = frozenset(
    "prefix add_special_tokens truncation padding max_length tokenizer_encode_kwargs"
    " continue_final_message tools documents handle_long_generation".split()
)
RETURN = frozenset(
    "return_full_text return_tensors return_text return_type clean_up_tokenization_spaces"
    " skip_special_tokens".split()
)
SAMPLING = frozenset("temperature top_k top_p min_p".split())
GENERATE = SAMPLING | frozenset(
    "max_new_tokens max_length min_new_tokens min_length do_sample repetition_penalty num_return_sequences"
    " eos_token_id pad_token_id bos_token_id stop_strings stop_sequence generation_config".split()
)
OWN = frozenset(
    "seed stop stop_token_ids presence_penalty frequency_penalty logit_bias logprobs ignore_eos priority"
    " cache_salt adapter".split()
)
FLOW = frozenset("stream streamer batch_size num_workers progress".split())
KNOWN = ENCODE | RETURN | GENERATE | OWN | FLOW

# transformers' own, where neither caller nor model say anything, and the pipeline's on top of them.
GLOBAL_DEFAULTS = {
    "min_length": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}
PIPELINE_DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
MAX_NEW_TOKENS_WITHOUT_LIMIT = 20  # max_new_tokens=None and no max_length

# Arguments of generate that are accepted at the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "use_cache": (True,),
    "use_mtp": (False,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "token_healing": (False,),
    "renormalize_logits": (False, True),
    "remove_invalid_values": (False,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "is_assistant": (False,),
}
# Fields of a generation config that would change the output, and are not offered.
REFUSED = frozenset(
    "max_time top_h bad_words_ids forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty"
    " suppress_tokens begin_suppress_tokens sequence_bias watermarking_config prompt_lookup_num_tokens"
    " assistant_early_exit dola_layers constraints force_words_ids".split()
)

FULL_TEXT, NEW_TEXT, TENSORS = "full_text", "new_text", "tensors"
_RETURN_TYPES = {0: TENSORS, 1: NEW_TEXT, 2: FULL_TEXT}  # transformers' ReturnType, by value


def check_names(arguments: Mapping[str, Any], origin: str = "pipeline") -> None:
    """Raises TypeError for an unknown name, ValueError for one that is known but not offered."""
    for name, value in arguments.items():
        if name in KNOWN:
            continue
        if name in NEUTRAL or name in REFUSED:
            _check_neutral(name, value, origin)
        else:
            raise TypeError(f"{origin}: {name} is not an argument of text generation here")


def _check_neutral(name: str, value: Any, origin: str) -> None:
    if value is None or value in NEUTRAL.get(name, ()):
        return
    accepted = " or ".join(map(repr, NEUTRAL.get(name, (None,))))
    raise ValueError(f"{origin}: {name}={value!r} is not supported; only {accepted} is")


def config_fields(config: Any) -> dict[str, Any]:
    """What a generation config sets: transformers' GenerationConfig, or a mapping with its names."""
    fields = dict(config) if isinstance(config, Mapping) else config.to_diff_dict()
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in fields.keys() & (NEUTRAL.keys() | REFUSED):
        # Left-over settings of beam search mean nothing without it.
        if name not in ("early_stopping", "length_penalty"):
            _check_neutral(name, fields[name], "generation_config")
    return {name: value for name, value in fields.items() if name in GENERATE}


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """How to continue a prompt. None of the lengths depends on the prompt yet."""

    fields: Mapping[str, Any]  # transformers' names
    own: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    stop: tuple[str, ...]  # the text ends before one of these
    stop_strings: tuple[str, ...]  # transformers': the text ends with the token that completes one
    num_sequences: int
    seed: int
    lengths_chosen: bool  # the caller chose the length, so it is not shortened to what the model holds

    @property
    def pad_token_id(self) -> int | None:
        pad = self.fields.get("pad_token_id")
        return pad if pad is not None else next(iter(self.eos_token_ids), None)

    @property
    def min_new_tokens(self) -> int:
        return self.fields.get("min_new_tokens") or 0

    def lengths(self, num_prompt: int, prefix_length: int, max_model_len: int) -> tuple[int, int]:
        """(least, most) tokens to add to a prompt. prefix_length of its tokens count in no limit.

        Raises ValueError naming what leaves no room, with both numbers.
        """
        room = max_model_len - num_prompt
        if room < 1:
            raise ValueError(f"prompt: {num_prompt} tokens leave no room in the model's {max_model_len}")
        fields, name = self.fields, "max_new_tokens"
        most = fields.get("max_new_tokens")
        if most is None and fields.get("max_length") is None:
            most = MAX_NEW_TOKENS_WITHOUT_LIMIT
        elif most is None:
            name, limit = "max_length", fields["max_length"] + prefix_length
            most = limit - num_prompt
            if most < 1:
                raise ValueError(f"max_length: {limit} leaves no room after a prompt of {num_prompt} tokens")
        if most > room and self.lengths_chosen:
            raise ValueError(
                f"{name}: {most} tokens after a prompt of {num_prompt} exceed the model's {max_model_len}"
            )
        most = min(most, room)
        name, least = "min_new_tokens", self.min_new_tokens
        if fields.get("min_new_tokens") is None and fields.get("min_length"):
            name, least = "min_length", max(0, fields["min_length"] + prefix_length - num_prompt)
        if least > most:
            raise ValueError(f"{name}: asks for {least} new tokens, but {most} are the most")
        return least, most

    def sampling_params(self, min_tokens: int, max_tokens: int, sample: int = 0) -> SamplingParams:
        """The request's parameters; sample counts a prompt's sequences. Raises ValueError by name."""
        fields, own = self.fields, self.own
        random_draws = bool(fields.get("do_sample")) and fields.get("temperature") != 0
        top_p = fields.get("top_p")
        sampling = {
            "temperature": _default(fields.get("temperature"), 1.0),
            "top_k": fields.get("top_k") or 0,
            "top_p": 1.0 if top_p is None else top_p,
            "min_p": fields.get("min_p") or 0.0,
            "seed": sibling_seed(self.seed, sample),
        }
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            **(sampling if random_draws else {"temperature": 0.0}),
            repetition_penalty=_default(fields.get("repetition_penalty"), 1.0),
            presence_penalty=own.get("presence_penalty") or 0.0,
            frequency_penalty=own.get("frequency_penalty") or 0.0,
            logit_bias={int(token): float(bias) for token, bias in (own.get("logit_bias") or {}).items()},
            stop_token_ids=_ids("stop_token_ids", own.get("stop_token_ids")),
            eos_token_ids=self.eos_token_ids,
            ignore_eos=bool(own.get("ignore_eos")),
            logprobs=own.get("logprobs"),
        )


def resolve_generate(
    call: Mapping[str, Any],
    init: Mapping[str, Any],
    model: Mapping[str, Any],
    tokenizer_pad: int | None = None,
) -> GenerateArgs:
    """Merges a call's arguments, those given to the pipeline, and the model's generation config.

    Call over pipeline (unless the call brings a generation_config, which then replaces those) over
    generation_config over model over the defaults. Raises ValueError or TypeError naming an argument.
    """
    given = dict(call) if call.get("generation_config") is not None else {**init, **call}
    if given.get("max_length", 0) is None:
        del given["max_length"]
    if (sequence := given.pop("stop_sequence", None)) is not None:
        given["stop_strings"] = sequence
    config = given.pop("generation_config", None)
    own = {name: given[name] for name in OWN & given.keys()}
    chosen = {**({} if config is None else config_fields(config)), **_only(given, GENERATE)}
    known = {**model, **chosen}
    defaults = {**PIPELINE_DEFAULTS, **({} if tokenizer_pad is None else {"pad_token_id": tokenizer_pad})}
    if "max_length" in known:
        del defaults["max_new_tokens"]
    fields = {**GLOBAL_DEFAULTS, **defaults, **known}
    if not fields["do_sample"]:
        unused = {name for name in SAMPLING & chosen.keys() if chosen[name] not in (None, 0, 1.0)}
        if unused:
            warnings.warn(f"do_sample=False is greedy: {', '.join(sorted(unused))} unused", stacklevel=4)
    _check_types({**fields, **own})
    if fields["num_return_sequences"] > 1 and not fields["do_sample"]:
        raise ValueError(
            "num_return_sequences: more than one needs do_sample=True, greedy ones are all the same"
        )
    seed = own.get("seed")
    return GenerateArgs(
        fields=fields,
        own=own,
        eos_token_ids=_ids("eos_token_id", fields.get("eos_token_id")),
        stop=_strings("stop", own.get("stop")),
        stop_strings=_strings("stop_strings", fields.get("stop_strings")),
        num_sequences=fields["num_return_sequences"],
        # Python's generator: transformers.set_seed and random.seed make a call repeatable.
        seed=random.getrandbits(63) if seed is None else seed,
        lengths_chosen=bool({"max_new_tokens", "max_length"} & chosen.keys()),
    )


def return_type(arguments: Mapping[str, Any]) -> str:
    """FULL_TEXT, NEW_TEXT or TENSORS. Raises ValueError where the return_* arguments exclude each other."""
    full, tensors, text = (arguments.get(f"return_{name}") for name in ("full_text", "tensors", "text"))
    chosen = arguments.get("return_type")
    if chosen is not None:
        value = getattr(chosen, "value", chosen)
        if value not in _RETURN_TYPES:
            raise ValueError(f"return_type: must be one of {sorted(_RETURN_TYPES)}, got {chosen!r}")
        return _RETURN_TYPES[value]
    if full is not None and text is not None:
        raise ValueError("return_text: excludes return_full_text")
    if full is not None and tensors:
        raise ValueError("return_tensors: excludes return_full_text")
    if tensors and text:
        raise ValueError("return_text: excludes return_tensors")
    if text is False and not tensors:
        raise ValueError("return_text: False asks for nothing; return_tensors=True gives token ids")
    if tensors:
        return TENSORS
    return NEW_TEXT if full is False else FULL_TEXT


_INTEGERS = (
    "max_new_tokens max_length min_new_tokens min_length top_k num_return_sequences pad_token_id bos_token_id"
    " seed logprobs priority"
).split()
_NUMBERS = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
_AT_LEAST = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_return_sequences": 1,
}


def _check_types(arguments: Mapping[str, Any]) -> None:
    for names, kinds in ((_INTEGERS, int), (_NUMBERS, (int, float))):
        for name in names:
            value = arguments.get(name)
            if value is None:
                continue
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(
                    f"{name}: must be a number ({'whole' if kinds is int else 'real'}), got {value!r}"
                )
            if name in _AT_LEAST and value < _AT_LEAST[name]:
                raise ValueError(f"{name}: must be at least {_AT_LEAST[name]}, got {value!r}")
    if not -(2**63) <= (arguments.get("seed") or 0) < 2**63:
        raise ValueError(f"seed: must be a 64-bit integer, got {arguments['seed']!r}")
    if arguments["num_return_sequences"] is None:
        raise ValueError("num_return_sequences: must be at least 1, got None")


def _only(arguments: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: arguments[name] for name in names & arguments.keys()}


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _ids(name: str, value: int | Sequence[int] | None) -> tuple[int, ...]:
    ids = [] if value is None else [value] if isinstance(value, int) else list(value)
    if any(not isinstance(token, int) or token < 0 for token in ids):
        raise ValueError(f"{name}: must be one token id or several, got {value!r}")
    return tuple(dict.fromkeys(ids))


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else list(value)
    if any(not isinstance(string, str) or not string for string in strings):
        raise ValueError(f"{name}: must be one string or several, none of them empty, got {value!r}")
    return tuple(strings)
