"""Block keys: 128-bit hashes chained over a sequence's full blocks.

A key names the block's tokens and all tokens before them, under a root that holds the model, the dtype, the
tenant's salt and the LoRA adapter, so equal keys mean equal KV. Knows nothing of blocks or pools; called by
the manager.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def root_key(*parts: str) -> bytes:
    """The parent of a sequence's first block. Parts cannot run into each other: each carries its length."""
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key (16 bytes) of a full block of token_ids whose predecessor's key is parent."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
