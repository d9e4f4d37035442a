"""The example tools: what the server is told of them, and what they do when they are called.

Knows functions and their schemas; talk.py calls them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def calculator(a: float, operation: str, b: float) -> str:
    if operation == "/" and b == 0:
        return "error: division by zero"
    return f"{_OPERATIONS[operation](a, b):g}"


def clock() -> str:
    return datetime.now(UTC).strftime("%A, %d %B %Y, %H:%M UTC")


_FUNCTIONS: dict[str, tuple[Callable[..., str], str, dict[str, Any]]] = {
    "calculator": (
        calculator,
        "Computes a sum, difference, product or quotient of two numbers.",
        {
            "a": {"type": "integer", "minimum": -10_000, "maximum": 10_000},
            "operation": {"type": "string", "enum": list(_OPERATIONS)},
            "b": {"type": "integer", "minimum": -10_000, "maximum": 10_000},
        },
    ),
    "clock": (clock, "Tells the date and the time.", {}),
}
NAMES = list(_FUNCTIONS)


def described(names: list[str]) -> list[dict[str, Any]]:
    """The tools of these names, as a request has them."""
    tools = []
    for name in names:
        _, description, properties = _FUNCTIONS[name]
        parameters = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        function = {"name": name, "description": description, "parameters": parameters}
        tools.append({"type": "function", "function": function})
    return tools


def call(name: str, arguments: dict[str, Any]) -> str:
    """What the tool answers; that it cannot is an answer too, for the model to read."""
    if name not in _FUNCTIONS:
        return f"error: there is no tool {name}"
    try:
        return _FUNCTIONS[name][0](**arguments)
    except (TypeError, KeyError) as error:
        return f"error: bad arguments for {name}: {error}"
