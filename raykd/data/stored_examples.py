"""Examples that come out of a file: whether a row can be one, before anything relies on it.

In:  a table of EXAMPLE_SCHEMA as somebody wrote it, perhaps before it had all its columns. Out: the reason against a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from raykd.types import CAWS_TIERS, EXAMPLE_SCHEMA, Example, Mark, SetKind, Source


def example_problem(table: pa.Table, index: int, vocab_size: int) -> str | None:
    """What is wrong with a row of a table of `with_all_columns`, or None."""
    row = {field.name: table[field.name][index].values for field in EXAMPLE_SCHEMA if pa.types.is_list(field.type)}
    with_nulls = [name for name, values in row.items() if values.null_count]
    if with_nulls:
        return f"`{with_nulls[0]}` holds null, expected numbers (texts in cot_steps)"
    lists = {name: values.to_numpy(zero_copy_only=False) for name, values in row.items()}
    numbers = {name: table[name][index].as_py() for name in ("source", "top_k", "num_teacher_layers", "caws_tier")}
    num_tokens = len(lists["input_ids"])
    if not num_tokens or len(lists["marks"]) != num_tokens:
        return f"`marks` has {len(lists['marks'])} entries for {num_tokens} tokens, expected one for each"
    is_response = (lists["marks"] & Mark.RESPONSE) != 0
    num_response = int(is_response.sum())
    if not num_response or is_response[0]:
        return "no token is marked as response" if not num_response else "the first token is a response: nothing predicts it"
    top_k, lengths = numbers["top_k"], {name: len(values) for name, values in lists.items()}
    if {lengths["topk_ids"], lengths["topk_logprobs"]} != {num_response * top_k} or (
        top_k and lengths["log_tail"] != num_response
    ):
        return (
            f"{lengths['topk_ids']} top-k ids, {lengths['topk_logprobs']} log-probabilities, {lengths['log_tail']} tails; "
            f"expected {num_response} response tokens x K {top_k}"
        )
    if numbers["source"] not in list(Source):
        return (
            f"`source` is {numbers['source']}, expected one of {', '.join(f'{s.value} ({s.name.lower()})' for s in Source)}"
        )
    if numbers["caws_tier"] not in (0, *CAWS_TIERS):
        return f"`caws_tier` is {numbers['caws_tier']}, expected 0 (none) or one of {', '.join(map(str, CAWS_TIERS))}"
    return (
        _targets_problem(lists, is_response)
        or _sets_problem(lists)
        or _grammar_problem(lists, vocab_size)
        or _states_problem(lengths["teacher_hidden"], numbers["num_teacher_layers"], num_tokens)
        or ids_problem(table, index, ("input_ids", "topk_ids", "set_ids"), vocab_size)
    )


def _targets_problem(lists: Mapping[str, np.ndarray], is_response: np.ndarray) -> str | None:
    """What is wrong with targets that belong to tokens one by one. `is_response`: bool [T]."""
    num_decisions, num_response = int(((lists["marks"] & Mark.DECISION) != 0).sum()), int(is_response.sum())
    num_halts, num_sampled = len(lists["halt_targets"]), len(lists["sampled_logprobs"])
    if num_halts != num_decisions:
        return f"`halt_targets` has {num_halts} entries, expected {num_decisions}: one for each token marked as decision"
    if num_sampled not in (0, num_response):
        return (
            f"`sampled_logprobs` has {num_sampled} entries, expected none, or one for each of {num_response} response tokens"
        )
    for name in ("set_position", "grammar_position"):
        positions = lists[name]
        inside = (positions >= 0) & (positions < len(is_response))
        wrong = positions[~inside | ~is_response[np.where(inside, positions, 0)]]
        if len(wrong):
            return f"`{name}` names token {wrong[0]} of {len(is_response)}, which is no response token"
    return None


def _sets_problem(lists: Mapping[str, np.ndarray]) -> str | None:
    num_sets = len(lists["set_position"])
    for name in ("set_kind", "set_sizes"):
        if len(lists[name]) != num_sets:
            return f"`{name}` has {len(lists[name])} entries, `set_position` {num_sets}; expected one for each set"
    sizes, kinds = lists["set_sizes"], lists["set_kind"]
    if (sizes < 1).any() or sizes.sum() != len(lists["set_ids"]):
        return (
            f"`set_ids` has {len(lists['set_ids'])} entries, expected the sum of `set_sizes` {sizes.tolist()[:9]}, all >= 1"
        )
    if not np.isin(kinds, list(SetKind)).all():
        return f"`set_kind` holds {kinds.min()} to {kinds.max()}, expected {min(SetKind)} to {max(SetKind)}"
    return None


def _grammar_problem(lists: Mapping[str, np.ndarray], vocab_size: int) -> str | None:
    rows, num_positions, num_words = lists["grammar_row"], len(lists["grammar_position"]), len(lists["grammar_masks"])
    if len(rows) != num_positions:
        return f"`grammar_row` has {len(rows)} entries, `grammar_position` {num_positions}; expected one for each token"
    if (rows < 0).any():
        return f"`grammar_row` holds {rows.min()}, expected rows of `grammar_masks` from 0 on"
    num_masks, width = int(rows.max(initial=-1)) + 1, -(-vocab_size // 32)
    if num_words != num_masks * width:
        return (
            f"`grammar_masks` has {num_words} words, expected {num_masks} masks x {width}: a bit for each of "
            f"{vocab_size} ids, the tokenizer's"
        )
    return None


def _states_problem(num_values: int, num_layers: int, num_tokens: int) -> str | None:
    num_states = num_layers * num_tokens
    if num_values % max(num_states, 1) or bool(num_values) != bool(num_states):
        return f"`teacher_hidden` has {num_values} values, expected a multiple of {num_layers} layers x {num_tokens} tokens"
    return None


def with_all_columns(table: pa.Table) -> pa.Table:
    """The columns in their types, with those that older files of examples lack; the default stands where there is null."""
    defaults = {f.name: f.default for f in dataclasses.fields(Example) if f.default is not dataclasses.MISSING}
    columns = []
    for field in EXAMPLE_SCHEMA:
        default = pa.scalar([] if pa.types.is_list(field.type) else defaults.get(field.name, 0), field.type)
        if field.name in table.column_names:
            columns.append(table[field.name].cast(field.type).fill_null(default))
        else:
            columns.append(pa.repeat(default, table.num_rows))
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def ids_problem(table: pa.Table, index: int, names: Sequence[str], vocab_size: int) -> str | None:
    """What is wrong with the ids of a row in these columns, or None."""
    for name in names:
        values = table[name][index].values
        ids = np.empty(0, np.int32) if values is None else values.to_numpy()
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            return f"`{name}` holds ids from {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}: the tokenizer's"
    return None
