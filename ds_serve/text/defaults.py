"""A model's own generation defaults, read from generation_config.json and config.json.

Plain json: knows neither transformers nor the tokenizer. The server fills in from here what a caller
left out; the pipeline, which mirrors transformers', asks transformers' own GenerationConfig.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What the model's files say; None where they say nothing. Lengths are in tokens.

    do_sample None means that the files do not say (transformers would then be greedy).
    """

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    max_position_embeddings: int | None = None

    @classmethod
    def load(cls, model_dir: str | Path) -> GenerationDefaults:
        """Reads model_dir. What generation_config.json lacks is looked up in config.json.

        Raises FileNotFoundError where model_dir has no config.json, ValueError (naming file and
        field) where a file is no JSON object or a field is of the wrong type.
        """
        folder = Path(model_dir)
        config = _read(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = _read(generation_path) if generation_path.is_file() else {}
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}

        def field(name: str) -> Any:
            for source in (generation, config, text):
                if source.get(name) is not None:
                    return source[name]
            return None

        def number(name: str, kind: type) -> Any:
            return _number(folder, name, field(name), kind)

        return cls(
            eos_token_ids=_ids(folder, "eos_token_id", field("eos_token_id")),
            pad_token_id=number("pad_token_id", int),
            bos_token_id=number("bos_token_id", int),
            do_sample=number("do_sample", bool),
            temperature=number("temperature", float),
            top_k=number("top_k", int),
            top_p=number("top_p", float),
            min_p=number("min_p", float),
            repetition_penalty=number("repetition_penalty", float),
            max_new_tokens=number("max_new_tokens", int),
            max_length=number("max_length", int),
            max_position_embeddings=number("max_position_embeddings", int),
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, found {type(value).__name__}")
    return value


def _number(folder: Path, name: str, value: Any, kind: type) -> Any:
    if value is None:
        return None
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{folder}: {name} must be {kind.__name__}, found {value!r}")
    return kind(value)


def _ids(folder: Path, name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(_number(folder, name, item, int) for item in values))
