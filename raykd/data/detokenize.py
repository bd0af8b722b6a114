"""Token ids back to text, with the characters of every token.

In:  token ids exactly as a model emitted or was given them.
Out: `TokenText`: the text they spell and, per token, the half-open range of characters it touches.

Text is never tokenised again: the ids are the axis. A token may hold part of a code point (byte-level and byte-fallback
tokenizers); its range is then that whole code point. Bytes that are no UTF-8 read as U+FFFD, one per byte.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class TokenText(NamedTuple):
    """What a sequence of T tokens spells."""

    text: str
    offsets: np.ndarray  # int64 [T, 2] characters of `text`


def decode_tokens(tokenizer: Any, ids: np.ndarray) -> TokenText:
    """Text and character offsets of `ids` [T], special tokens included; no Python per token where the bytes are known.

    Raises ValueError where an id is outside the vocabulary, or where the tokenizer's decoder is of an unknown kind and
    decoding prefix by prefix does not grow the text.
    """
    ids = np.asarray(ids)
    table = _byte_table(tokenizer, len(tokenizer))
    if table is None:
        return _decode_by_prefixes(tokenizer, ids)
    data, starts = table
    if len(ids) and (ids.min() < 0 or ids.max() >= len(starts) - 1):
        raise ValueError(
            f"token id {ids.max()} found, expected ids below {len(starts) - 1}: is this the teacher's tokenizer?"
        )
    lengths = starts[ids + 1] - starts[ids]
    ends = np.cumsum(lengths)
    gather = np.arange(ends[-1] if len(ids) else 0) + np.repeat(starts[ids] - (ends - lengths), lengths)
    text = data[gather].tobytes().decode("utf-8", "surrogateescape")
    # Characters start where these bytes do; an undecodable byte is one surrogate, that is one character.
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    invalid = (code_points >= 0xDC80) & (code_points <= 0xDCFF)
    widths[invalid] = 1
    character_starts = np.cumsum(widths) - widths
    first = np.searchsorted(character_starts, ends - lengths, side="right") - 1
    last = np.searchsorted(character_starts, ends, side="left")
    empty = lengths == 0
    first[empty] = last[empty]
    if invalid.any():
        text = re.sub("[\udc80-\udcff]", "\ufffd", text)
    return TokenText(text, np.stack([first, last], axis=1))


def token_bytes(tokenizer: Any) -> list[bytes] | None:
    """The bytes that every id [V] spells; None where the tokenizer's decoder is of an unknown kind."""
    table = _byte_table(tokenizer, len(tokenizer))
    if table is None:
        return None
    data, bounds = table[0].tobytes(), table[1].tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


@lru_cache(maxsize=4)
def _byte_table(tokenizer: Any, num_tokens: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Bytes of every token, flat uint8, and their starts [V + 1]; None where the decoder is of an unknown kind.

    `num_tokens`: of the tokenizer, which may be given more.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    decoders = _flatten_decoder(state.get("decoder"))
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        to_bytes = _byte_level
    elif kinds & {"Metaspace", "ByteFallback"} or any(_replaces_metaspace(decoder) for decoder in decoders):
        to_bytes = _metaspace_with_fallback if "ByteFallback" in kinds else _metaspace
    else:
        return None
    added = {token["id"]: token["content"] for token in state.get("added_tokens", ())}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        pieces[index] = added[index].encode() if index in added else to_bytes(token)
    starts = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=starts[1:])
    return np.frombuffer(b"".join(pieces), dtype=np.uint8), starts


def _flatten_decoder(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [leaf for part in decoder["decoders"] for leaf in _flatten_decoder(part)]
    return [decoder]


def _replaces_metaspace(decoder: dict[str, Any]) -> bool:
    return decoder["type"] == "Replace" and decoder.get("pattern") == {"String": "▁"}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(map(_BYTE_OF.__getitem__, token))
    return token.encode()


def _metaspace(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _metaspace_with_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return _metaspace(token)


def _decode_by_prefixes(tokenizer: Any, ids: np.ndarray) -> TokenText:
    """Any other tokenizer: decode every prefix. Quadratic, so for short texts and unusual tokenizers."""
    listed = ids.tolist()
    text, bounds = "", [0]
    for count in range(1, len(listed) + 1):
        grown = tokenizer.decode(listed[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stable = grown.rstrip("\ufffd")  # a code point that the next tokens may complete
        if not grown.startswith(text.rstrip("\ufffd")):
            raise ValueError(
                f"decoding {count} tokens does not continue the text of {count - 1}: expected {text[-20:]!r} to stay, "
                f"found {grown[-30:]!r}; use a fast tokenizer (byte-level, or SentencePiece converted)"
            )
        text = grown
        bounds.append(len(stable))
    offsets = np.array([bounds[:-1], bounds[1:]], dtype=np.int64).T
    held = offsets[:, 0] == offsets[:, 1]  # part of a code point: it ends with the token that completes it
    offsets[held, 1] = np.minimum(offsets[held, 0] + 1, len(text))
    return TokenText(text, offsets)
