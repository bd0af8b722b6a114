"""Which ids of a vocabulary open a tool call.

In:  a tokenizer, and the call formats its model writes (by default those its chat template names).
Out: ids, found by one scan of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np

FORMATS = {
    "hermes": ("<tool_call>",),
    "llama": ("<|python_tag|>", "<function="),
    "mistral": ("[TOOL_CALLS]",),
    "json": ("{", "[", "```json"),
}
"""Call formats and the texts that they may begin with."""

# Of the ids that begin with a brace or bracket those after which an object with quoted keys can still follow.
_JSON = re.compile(r"(?:\[\s*)?(?:\{\s*(?:\"\w*(?:\"\s*:?.*)?)?)?\Z", re.DOTALL)


def call_formats(tokenizer: Any) -> tuple[str, ...]:
    """Formats whose marker the chat template names; ("json",) where it names none."""
    template = getattr(tokenizer, "chat_template", None)
    text = template if isinstance(template, str) else " ".join((template or {}).values())
    named = tuple(name for name, openings in FORMATS.items() if name != "json" and any(o in text for o in openings))
    return named or ("json",)


def call_openings(tokenizer: Any, formats: Collection[str] | None = None) -> np.ndarray:
    """Ids int64 [S], sorted, whose text without leading white space begins a call of one of the formats.

    A marker that the tokenizer splits is opened by the piece that it really begins with, or a longer one: where
    `<tool_call>` is a token of its own, `<` alone opens no call. `formats`: names of `FORMATS`; None: `call_formats`.

    Raises ValueError for a format that is not known.
    """
    names = call_formats(tokenizer) if formats is None else tuple(formats)
    unknown = sorted(set(names) - FORMATS.keys())
    if unknown or not names:
        raise ValueError(f"call formats {list(names)}: expected one or more of {', '.join(FORMATS)}")
    size = len(tokenizer)
    decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    texts = [text.lstrip() for text in tokenizer.batch_decode([[index] for index in range(size)], **decode)]
    ids: set[int] = set()
    for opening in (opening for name in names for opening in FORMATS[name]):
        first = next((t for i in tokenizer(opening, add_special_tokens=False)["input_ids"] if (t := texts[i])), opening)
        for index, text in enumerate(texts):
            whole = text.startswith(opening) and (opening not in ("{", "[") or _JSON.match(text))
            if whole or (len(text) >= len(first) and opening.startswith(text)):
                ids.add(index)
    return np.array(sorted(ids), dtype=np.int64)
