"""Reads server-sent events from bytes that are cut anywhere.

Knows the event stream format (WHATWG HTML, 9.2), not what is in the events. The client feeds it.
"""

from __future__ import annotations


class EventReader:
    """Turns pieces of a stream into the data of its events. Keeps what follows the last blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that is complete now; lines of one event are joined by newlines."""
        buffer = self._rest + piece if self._rest else piece
        held = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # a \n may follow, and is then the same line's end
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blocks = buffer.split(b"\n\n")
        self._rest = blocks.pop() + held
        events = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(block[6:])
            elif (data := _data(block)) is not None:
                events.append(data)
        return events


def _data(block: bytes) -> bytes | None:
    values = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name.removeprefix(b"\xef\xbb\xbf") == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
