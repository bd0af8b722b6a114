"""Stable ids of rows: the same on every machine and in every run.

In:  what makes a row that row; the number of the pass over it. Out: int64, never negative.
"""

from __future__ import annotations

import hashlib

import numpy as np


def hash_uid(*parts: str | np.ndarray) -> int:
    """63-bit hash of the parts, each with its length, so that no two lists of parts run together."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little") >> 1


def rejected_uid(uid: int) -> int:
    """Uid of the rejected half of the pair that row `uid` holds, positive; it is also the number of the pair."""
    return hash_uid("rejected", str(uid)) | 1


def epoch_uid(uid: np.ndarray, epoch: int | np.ndarray) -> np.ndarray:
    """Uids of rows in a pass over them, int64, not negative: pass 0 has the rows' own, others a mix of both (splitmix64)."""
    with np.errstate(over="ignore"):
        x = uid.astype(np.uint64) + np.asarray(epoch).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
    return np.where(np.asarray(epoch) == 0, uid, mixed)
