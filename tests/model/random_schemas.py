"""Random JSON schemas that bound what they describe: every text that follows one ends."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["a", "name", "x y", "ключ", 'q"uo', "back\\slash", "🙂", "", "type", "tab\t", "é"]
PATTERNS = ["^[a-z]{2,4}$", "^\\d{1,3}\\.\\d{2}$", "^(foo|bar)?$", "^.{1,3}$", "^[éa]{1,4}x$", "^\\w{1,5}$"]
FORMATS = ["date", "uuid", "ipv4"]
CONSTANTS = [1, -2.5, None, True, 0, "word", "é\n", [1, "x"], {"k": [], "l": {}}]


def random_schemas(count: int, seed: int) -> list[dict[str, Any]]:
    """count schemas, the same for a seed."""
    draw = random.Random(seed)
    return [_schema(draw, 0) for _ in range(count)]


def _schema(draw: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_string, _pattern, _format, _integer, _multiple, _plain, _enum, _const, _types]
    branches = [_object, _object, _array, _tuple, _any_of, _all_of, _map, _reference]
    return draw.choice(leaves + branches if depth < 2 else leaves)(draw, depth)


def _string(draw, depth):
    least = draw.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 6)}


def _pattern(draw, depth):
    return {"type": "string", "pattern": draw.choice(PATTERNS)}


def _format(draw, depth):
    return {"type": "string", "format": draw.choice(FORMATS)}


def _integer(draw, depth):
    least = draw.randint(-1000, 1000)
    bounds = [draw.choice(["minimum", "exclusiveMinimum"]), draw.choice(["maximum", "exclusiveMaximum"])]
    return {"type": "integer", bounds[0]: least, bounds[1]: least + draw.randint(2, 10 ** draw.randint(1, 6))}


def _multiple(draw, depth):
    step = draw.choice([1, 2, 7, 0.5, 0.25, 100])
    return {"type": "number", "multipleOf": step, "minimum": 0, "maximum": step * draw.randint(1, 1000)}


def _plain(draw, depth):
    return {"type": draw.choice(["boolean", "null"])}


def _enum(draw, depth):
    return {"enum": [draw.choice(CONSTANTS) for _ in range(draw.randint(1, 4))]}


def _const(draw, depth):
    return {"const": draw.choice(CONSTANTS)}


def _types(draw, depth):
    return {"type": ["string", "null", "integer"], "maxLength": 4, "minimum": 0, "maximum": 12}


def _array(draw, depth):
    least = draw.randint(0, 2)
    most = least + draw.randint(0, 2)
    return {"type": "array", "items": _schema(draw, depth + 1), "minItems": least, "maxItems": most}


def _tuple(draw, depth):
    places = [_schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]
    return {"type": "array", "prefixItems": places, "items": False, "minItems": draw.randint(0, len(places))}


def _object(draw, depth):
    names = draw.sample(NAMES, draw.randint(0, 4))
    return {
        "type": "object",
        "title": "annotations say nothing of a value",
        "properties": {name: _schema(draw, depth + 1) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
        "additionalProperties": False,
    }


def _map(draw, depth):
    return {
        "type": "object",
        "patternProperties": {"^[a-c]{1,3}$": _schema(draw, depth + 1)},
        "additionalProperties": False,
        "maxProperties": draw.randint(1, 2),
    }


def _any_of(draw, depth):
    return {"anyOf": [_schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]}


def _all_of(draw, depth):
    return {"allOf": [_object(draw, depth + 1), {"type": "object"}]}


def _reference(draw, depth):
    if depth:
        return _plain(draw, depth)
    return {
        "$defs": {"one": _schema(draw, depth + 1)},
        "type": "array",
        "items": {"$ref": "#/$defs/one"},
        "maxItems": 2,
    }
