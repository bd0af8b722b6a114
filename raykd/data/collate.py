"""Examples to padded micro-batches.

In:  rows of `EXAMPLE_SCHEMA` (or `Example`s) and the lengths of their sequences.
Out: `Batch` tensors, padded once from Arrow's own buffers, and the split of many rows into micro-batches by token budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from raykd.data.examples import examples_to_table
from raykd.data.turns import find_turns
from raykd.types import Batch, Example, Mark


def collate_kd_batch(examples: pa.Table | Sequence[Example], pad_id: int) -> Batch:
    """One right-padded micro-batch [B, T] with its N response tokens packed in row-major order.

    K is the widest of the batch; narrower rows are filled with (id 0, -inf), rows without teacher scores also with
    `log_tail` 0 (all mass in the tail) and `has_teacher` False. Raises ValueError for an empty batch.
    """
    table: pa.Table = examples if isinstance(examples, pa.Table) else examples_to_table(cast(Sequence[Example], examples))
    if table.num_rows == 0:
        raise ValueError("no examples to collate: found 0 rows, expected at least one")
    flat_ids, lengths = _flat(table, "input_ids")
    flat_marks, mark_lengths = _flat(table, "marks")
    assert np.array_equal(lengths, mark_lengths), "marks and input_ids are of different length"
    rows, width = len(lengths), int(lengths.max())
    place = _ranges(np.arange(rows) * width, lengths)  # position of every token in the flattened [B * T]

    input_ids = np.full(rows * width, pad_id, dtype=np.int64)
    input_ids[place] = flat_ids
    marks = np.zeros(rows * width, dtype=np.int32)
    marks[place] = flat_marks
    attention = np.zeros(rows * width, dtype=bool)
    attention[place] = True

    is_response = (flat_marks & Mark.RESPONSE) != 0
    response_index = place[is_response]
    assert not (response_index % width == 0).any(), "a response token in column 0 has nothing that predicts it"
    row_of_token = np.repeat(np.arange(rows), lengths)
    response_row = row_of_token[is_response]
    top_k = table["top_k"].to_numpy().astype(np.int64)
    source = table["source"].to_numpy().astype(np.int8)
    topk_ids, topk_logprobs, log_tail = _pack_scores(table, top_k, response_row)
    return Batch(
        uid=torch.from_numpy(table["uid"].to_numpy().astype(np.int64)),
        input_ids=torch.from_numpy(input_ids.reshape(rows, width)),
        attention_mask=torch.from_numpy(attention.reshape(rows, width)),
        marks=torch.from_numpy(marks.reshape(rows, width)),
        response_index=torch.from_numpy(response_index),
        response_source=torch.from_numpy(source[response_row]),
        topk_ids=torch.from_numpy(topk_ids),
        topk_logprobs=torch.from_numpy(topk_logprobs),
        log_tail=torch.from_numpy(log_tail),
        has_teacher=torch.from_numpy((topk_logprobs > -np.inf).any(axis=1)),
        end_index=torch.from_numpy(_last_response(response_index, response_row, rows, width)),
        quality=_scalar(table, "quality"),
        pair=_scalar(table, "pair"),
        reference_logprob=_scalar(table, "reference_logprob"),
        caws_tier=_scalar(table, "caws_tier"),
        target_length=_scalar(table, "target_length"),
        decision_index=torch.from_numpy(place[(flat_marks & Mark.DECISION) != 0]),
        halt_targets=torch.from_numpy(_flat(table, "halt_targets")[0].astype(np.float32)),
        response_advantage=_scalar(table, "advantage")[response_row],
        response_old_logprob=torch.from_numpy(_pack_sampled(table, response_row)),
        tool_name_weight=_scalar(table, "tool_name_weight")[response_row],
        rollout_row=torch.from_numpy(np.flatnonzero(table["target_length"].to_numpy()[response_row] > 0)),
        pair_row=torch.from_numpy(np.flatnonzero(table["pair"].to_numpy()[response_row])),
        **_pack_turns(flat_marks, row_of_token),
        **_pack_sets(table, response_index, width),
        **_pack_grammar(table, response_index, width),
        **_pack_hidden(table, place),
    )


def _scalar(table: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(table[name].to_numpy().copy())


def _pack_turns(flat_marks: np.ndarray, row_of_token: np.ndarray) -> dict[str, torch.Tensor]:
    turns = find_turns(flat_marks, row_of_token)
    return {
        "turn_first": torch.from_numpy(turns.first),
        "turn_has_call": torch.from_numpy(turns.has_call),
        "index_in_turn": torch.from_numpy(turns.index_in_turn),
    }


def _last_response(response_index: np.ndarray, response_row: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Flattened position of the last response token of each row; of its first token where it has none."""
    last = np.arange(rows) * width
    last[response_row] = response_index  # in order: the last one of a row stays
    return last


def _packed_rows(table: pa.Table, name: str, response_index: np.ndarray, width: int) -> np.ndarray:
    """Index into the N response tokens of the tokens that a column of positions names."""
    positions, counts = _flat(table, name)
    flat = positions + np.repeat(np.arange(len(counts)) * width, counts)
    found = np.searchsorted(response_index, flat)
    assert np.array_equal(response_index[np.minimum(found, len(response_index) - 1)], flat) or not len(flat), (
        f"{name} names a token that is no response token"
    )
    return found.astype(np.int64)


def _pack_sets(table: pa.Table, response_index: np.ndarray, width: int) -> dict[str, torch.Tensor]:
    """Sets of ids of all rows, one after the other, filled with -1 to the size of the largest."""
    sizes = _flat(table, "set_sizes")[0].astype(np.int64)
    ids = np.full((len(sizes), int(sizes.max(initial=0))), -1, dtype=np.int64)
    ids[np.arange(ids.shape[1]) < sizes[:, None]] = _flat(table, "set_ids")[0]
    return {
        "set_row": torch.from_numpy(_packed_rows(table, "set_position", response_index, width)),
        "set_kind": torch.from_numpy(_flat(table, "set_kind")[0].astype(np.int64)),
        "set_ids": torch.from_numpy(ids),
    }


def _pack_grammar(table: pa.Table, response_index: np.ndarray, width: int) -> dict[str, torch.Tensor]:
    """Masks of legal ids of all rows, one under the other, and which of them each argument token has."""
    mask, counts = _flat(table, "grammar_row")
    words, num_words = _flat(table, "grammar_masks")
    num_masks = np.array([int(part.max(initial=-1)) + 1 for part in np.split(mask, np.cumsum(counts)[:-1])])
    widths = num_words[num_masks > 0] // num_masks[num_masks > 0]
    assert len(np.unique(widths)) <= 1, f"grammar masks are of different vocabularies: {np.unique(widths)} words"
    first = np.cumsum(num_masks) - num_masks
    return {
        "grammar_row": torch.from_numpy(_packed_rows(table, "grammar_position", response_index, width)),
        "grammar_mask": torch.from_numpy((mask + np.repeat(first, counts)).astype(np.int64)),
        "grammar_masks": torch.from_numpy(words.reshape(int(num_masks.sum()), -1 if num_masks.any() else 0).copy()),
    }


def _pack_hidden(table: pa.Table, place: np.ndarray) -> dict[str, torch.Tensor]:
    """Teacher states [L, M, H] of the tokens that have one, and where those stand; other rows and tokens take no room."""
    layers = table["num_teacher_layers"].to_numpy()
    kinds = sorted(set(layers[layers > 0].tolist()))
    assert len(kinds) <= 1, f"rows have states of {kinds} teacher layers"
    if not kinds:
        return {}
    states, counts = _flat(table, "teacher_hidden")
    lengths = _flat(table, "input_ids")[1]
    of_row = np.split(states, np.cumsum(counts)[:-1])
    place_of_row = np.split(place, np.cumsum(lengths)[:-1])
    parts, places = [], []
    for row in np.flatnonzero(layers):
        part = of_row[row].reshape(kinds[0], lengths[row], -1)
        known = ~np.isnan(part[0, :, 0])
        parts.append(part[:, known])
        places.append(place_of_row[row][known])
    return {
        "state_index": torch.from_numpy(np.concatenate(places)),
        "teacher_hidden": torch.from_numpy(np.concatenate(parts, axis=1)),
    }


def _pack_scores(table: pa.Table, top_k: np.ndarray, response_row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Teacher scores of the N response tokens: ids [N, K], log-probabilities [N, K], tail [N]."""
    ids, id_lengths = _flat(table, "topk_ids")
    logprobs, _ = _flat(table, "topk_logprobs")
    tail, tail_lengths = _flat(table, "log_tail")
    num_tokens, width = len(response_row), int(top_k.max())
    entries = top_k[response_row]  # K of every response token
    num_response = np.bincount(response_row, minlength=len(top_k))
    assert np.array_equal(id_lengths, num_response * top_k), "top-k scores do not cover the response tokens"
    assert np.array_equal(tail_lengths, np.where(top_k > 0, num_response, 0)), "log_tail does not cover the response"
    log_tail = np.zeros(num_tokens, dtype=np.float32)
    log_tail[entries > 0] = tail
    if (entries == width).all():  # one K for all, the usual case
        shape = (num_tokens, width)
        return ids.astype(np.int64).reshape(shape), logprobs.astype(np.float32).reshape(shape), log_tail
    place = _ranges(np.arange(num_tokens) * width, entries)
    packed_ids = np.zeros(num_tokens * width, dtype=np.int64)
    packed_ids[place] = ids
    packed = np.full(num_tokens * width, -np.inf, dtype=np.float32)
    packed[place] = logprobs
    return packed_ids.reshape(num_tokens, width), packed.reshape(num_tokens, width), log_tail


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a list column, and the length of every row."""
    column = table[name].combine_chunks()
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return column.flatten().to_numpy(zero_copy_only=False), lengths


def _pack_sampled(table: pa.Table, response_row: np.ndarray) -> np.ndarray:
    """Log-probability [N] of every response token under the weights that sampled it; NaN in rows that were not sampled."""
    logprobs, lengths = _flat(table, "sampled_logprobs")
    sampled = lengths[response_row] > 0
    assert len(logprobs) == np.count_nonzero(sampled), "sampled_logprobs do not cover the response tokens"
    packed = np.full(len(response_row), np.nan, dtype=np.float32)
    packed[sampled] = logprobs
    return packed


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, ... lengths[i] of them, for every i, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def split_micro_batches(
    lengths: np.ndarray | Sequence[int], max_tokens: int, pair: np.ndarray | Sequence[int] = ()
) -> list[np.ndarray]:
    """Row indices of micro-batches whose padded size (rows x longest) is at most `max_tokens`; every row exactly once.

    Rows of like length share a micro-batch, longest first, so that padding is small and memory peaks at once. Rows of the
    same |`pair`| (0: of none) stay together, as if all were as long as the longest of them. What is over the budget by
    itself gets a micro-batch of its own. Raises ValueError for a budget below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1 token for a micro-batch")
    lengths = np.asarray(lengths, dtype=np.int64)
    group = np.arange(len(lengths))  # by its first row
    if len(pair):
        _, first, which = np.unique(np.abs(pair), return_index=True, return_inverse=True)
        group = np.where(np.asarray(pair) == 0, group, first[which])
    longest = np.ones(len(lengths), dtype=np.int64)
    np.maximum.at(longest, group, lengths)
    order = np.lexsort((group, -longest[group]))
    ends = np.flatnonzero(np.diff(group[order], append=-1)) + 1  # where a micro-batch may end
    batches, start = [], 0
    while start < len(order):
        fitting = start + max_tokens // int(longest[group[order[start]]])
        last = np.searchsorted(ends, fitting, side="right") - 1
        stop = int(ends[max(last, np.searchsorted(ends, start, side="right"))])
        batches.append(order[start:stop])
        start = stop
    return batches
