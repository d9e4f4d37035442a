"""The items that a response is made of, as they grow, and the events that tell of each.

Knows the wording of messages and function calls; which piece goes into which item is responses.py's. An
event is its name and its fields but for the sequence number.
"""

from __future__ import annotations

import uuid

Event = tuple[str, dict]


class TextItem:
    """The message item at output_index: one part of text."""

    def __init__(self, output_index: int) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._at = {"item_id": self._id, "output_index": output_index, "content_index": 0}
        self._index = output_index
        self._text: list[str] = []
        self._logprobs: list[dict] = []

    def begin(self) -> list[Event]:
        item = self._item("in_progress", [])
        return [
            ("response.output_item.added", {"output_index": self._index, "item": item}),
            ("response.content_part.added", {**self._at, "part": self._part()}),
        ]

    def more(self, text: str, logprobs: list[dict]) -> list[Event]:
        self._text.append(text)
        self._logprobs += logprobs
        return [("response.output_text.delta", {**self._at, "delta": text, "logprobs": logprobs})]

    def end(self, status: str) -> list[Event]:
        part = self._part()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            ("response.output_text.done", {**self._at, **done}),
            ("response.content_part.done", {**self._at, "part": part}),
            ("response.output_item.done", {"output_index": self._index, "item": self.item(status)}),
        ]

    def item(self, status: str) -> dict:
        return self._item(status, [self._part()])

    def _item(self, status: str, content: list[dict]) -> dict:
        return {
            "type": "message",
            "id": self._id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self) -> dict:
        text, logprobs = "".join(self._text), list(self._logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class CallItem:
    """The call of a function, the item at output_index. call_id is what its result names."""

    def __init__(self, output_index: int, call_id: str, name: str) -> None:
        self._id = f"fc_{uuid.uuid4().hex}"
        self._at = {"item_id": self._id, "output_index": output_index}
        self._index = output_index
        self._call_id, self._name = call_id, name
        self._arguments: list[str] = []

    def begin(self) -> list[Event]:
        item = self.item("in_progress")
        return [("response.output_item.added", {"output_index": self._index, "item": item})]

    def more(self, arguments: str) -> list[Event]:
        self._arguments.append(arguments)
        return [("response.function_call_arguments.delta", {**self._at, "delta": arguments})]

    def end(self, status: str) -> list[Event]:
        item = self.item(status)
        done = {"name": self._name, "arguments": item["arguments"]}
        return [
            ("response.function_call_arguments.done", {**self._at, **done}),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    def item(self, status: str) -> dict:
        return {
            "type": "function_call",
            "id": self._id,
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }
