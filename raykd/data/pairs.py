"""Two responses to one prompt, of which one is preferred: how the halves of such a pair are made, and told apart.

In:  the examples of a row of data: one, or the preferred response and the rejected one. Out: the same, numbered.

The rejected half stands right behind the preferred one. Its uid is the number of the pair, which is derived from the uid of
the row, so that `uid == -pair` says of any example that it is no row of its own: the row counts by its preferred half.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from raykd.data.uids import rejected_uid
from raykd.types import Example, Mark, Source


def rejected_half(example: Example) -> Example:
    """An example without all that a loss could take for a target: its tokens, and which of them call tools directly."""
    num_response = int(np.count_nonzero(example.marks & Mark.RESPONSE))
    return Example(
        uid=example.uid,
        source=Source.STUDENT,
        input_ids=example.input_ids,
        marks=example.marks & np.uint16(Mark.RESPONSE | Mark.DIRECT_TOOL),
        topk_ids=np.empty((num_response, 0), np.int32),
        topk_logprobs=np.empty((num_response, 0), np.float16),
        log_tail=np.empty(0, np.float32),
        caws_tier=example.caws_tier,
    )


def numbered(examples: tuple[Example, ...], uid: int, *, held_out: bool = False) -> tuple[Example, ...]:
    """The examples of a row in a pass over the data, where the row has this uid; one alone is no half of anything."""
    first = replace(examples[0], uid=uid, pair=0, held_out=held_out or examples[0].held_out)
    if len(examples) == 1:
        return (first,)
    pair = rejected_uid(uid)
    return replace(first, pair=pair), replace(examples[1], uid=pair, pair=-pair, held_out=first.held_out)


def begins_row(examples: pa.Table) -> np.ndarray:
    """Which rows of an EXAMPLE_SCHEMA table are rows of the data, bool [R]: all but the rejected halves."""
    uid, pair = examples["uid"].to_numpy(), examples["pair"].to_numpy()
    return (pair >= 0) | (uid != -pair)
