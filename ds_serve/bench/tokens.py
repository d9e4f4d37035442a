"""Token ids and words made from numbers: the same key gives the same tokens, on every machine.

Knows arithmetic only; the prompt sources choose the keys.
"""

from __future__ import annotations

import numpy as np

LOWEST_ID = 16  # special tokens often have the ids below

# Common enough to be one token, or nearly, in most vocabularies.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were all her she there would their we him been has when who will no more if out "
    "so up said what its about than into them can only other time new some could these two may first then "
    "do any like my now over such our man me even most made after also did many off before must well back "
    "through years much where your way down should because long each just state those people too how "
    "little good world make very year still see work life get day part same house here own under last "
    "great might while old city since against right come place without again around small home next water "
    "men never between another need"
).split()


def keyed(keys: np.ndarray | int, count: int) -> np.ndarray:
    """[keys * count] uint64, pseudo-random in [0, 2**32): count for each key, one key's after another's."""
    keys = _mix(np.atleast_1d(np.asarray(keys, dtype=np.uint64)))
    return (_mix(keys[:, None] + np.arange(count, dtype=np.uint64)) >> np.uint64(32)).ravel()


def key(*parts: int) -> int:
    """One 64-bit key from several numbers, in order."""
    result = np.zeros(1, dtype=np.uint64)
    for part in parts:
        result = _mix(result + np.uint64(part % 2**64))
    return int(result[0])


def to_ids(numbers: np.ndarray, vocab_size: int) -> list[int]:
    """Token ids in [LOWEST_ID, vocab_size)."""
    return (numbers % np.uint64(vocab_size - LOWEST_ID) + np.uint64(LOWEST_ID)).tolist()


def to_text(numbers: np.ndarray) -> str:
    """One common word for each number."""
    return " ".join([WORDS[index] for index in (numbers % np.uint64(len(WORDS))).tolist()])


def _mix(value: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits whose outputs look random (Stafford's variant 13 of a 64-bit finalizer)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
