"""The key and room of the tests' server; what all clients ask: a question and its answer, a schema, tools."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

KEY = "sk-of-the-tests"
MAX_RUNNING = MAX_WAITING = 2

ITALY = [{"role": "user", "content": "What is the capital of Italy?"}]
ANSWER = "Rome"
GREEDY = {"temperature": 0, "max_tokens": 24}
LONG = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}  # takes seconds


class City(BaseModel):
    """A city and its size."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Rome", "Paris", "Berlin"]
    size: Literal["small", "large"]


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Paris", "Berlin"]


def tool(model: type[BaseModel]) -> dict:
    """model as OpenAI's tool of that name."""
    function = {
        "name": model.__name__,
        "description": model.__doc__,
        "parameters": model.model_json_schema(),
        "strict": True,
    }
    return {"type": "function", "function": function}


def schema(model: type[BaseModel]) -> dict:
    """model as a response_format."""
    form = {"name": model.__name__, "schema": model.model_json_schema(), "strict": True}
    return {"type": "json_schema", "json_schema": form}
