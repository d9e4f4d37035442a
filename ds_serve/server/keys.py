"""API keys: where they come from, and whether a request brings one of them.

Knows digests of keys, never hands out a key, and writes none into an error. run.py makes one ring; gate.py
asks it at each request.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from ds_serve.config import Settings

_SCHEME = b"bearer "


class KeyRing:
    """The accepted keys. Without any, every request is welcome (is_open)."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises ValueError for a key that no header could carry."""
        unique = dict.fromkeys(keys)
        for number, key in enumerate(unique, 1):
            if not all("!" <= char <= "~" for char in key):
                raise ValueError(f"api_keys: key {number} has a space or a character beyond ASCII")
        self._digests = [_digest(key.encode()) for key in unique]

    @classmethod
    def load(cls, settings: Settings) -> KeyRing:
        """Keys of the settings and of their file.

        Raises OSError for a file that cannot be read, ValueError for one without keys: who names a file wants
        a server that is closed.
        """
        keys = [key.get_secret_value() for key in settings.api_keys]
        if settings.api_key_file is not None:
            try:
                lines = Path(settings.api_key_file).read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                raise ValueError("api_key_file: is not UTF-8 text") from None
            stripped = (line.strip() for line in lines)
            of_file = [line for line in stripped if line and not line.startswith("#")]
            if not of_file:
                raise ValueError(f"api_key_file: {settings.api_key_file} holds no key")
            keys += of_file
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def is_open(self) -> bool:
        return not self._digests

    def find(self, authorization: bytes) -> int:
        """The number, from 1, of the key in an Authorization header; 0 where it holds none of ours.

        Takes the same time for every wrong key: digests are compared, and always all of them.
        """
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            return 0
        digest = _digest(authorization[len(_SCHEME) :].strip())
        found = 0
        for number, known in enumerate(self._digests, 1):
            found += number * hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
