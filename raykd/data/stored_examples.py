"""Examples that come out of a file: whether a row can be one, before anything relies on it.

In:  a table of EXAMPLE_SCHEMA as somebody wrote it, perhaps before it had all its columns. Out: the reason against a row,
     or DataError against the file where its columns have other types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from raykd.data.offline_scores import MASS_TOLERANCE
from raykd.data.readers import DataError
from raykd.types import CAWS_TIERS, EXAMPLE_SCHEMA, Example, Mark, SetKind, Source


def example_problem(table: pa.Table, index: int, vocab_size: int) -> str | None:
    """What is wrong with a row of a table of `with_all_columns`, or None."""
    row = {field.name: table[field.name][index].values for field in EXAMPLE_SCHEMA if pa.types.is_list(field.type)}
    with_nulls = [name for name, values in row.items() if values.null_count]
    if with_nulls:
        return f"`{with_nulls[0]}` holds null, expected numbers (texts in cot_steps)"
    lists = {name: values.to_numpy(zero_copy_only=False) for name, values in row.items()}
    names = ("source", "top_k", "num_teacher_layers", "caws_tier", "quality", "tool_name_weight")
    numbers = {name: table[name][index].as_py() for name in names}
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
        or logprobs_problem(table, index, ("topk_logprobs", "log_tail", "sampled_logprobs"))
        or _values_problem(lists["halt_targets"], numbers["quality"], numbers["tool_name_weight"])
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


def _values_problem(halt_targets: np.ndarray, quality: float, tool_name_weight: float) -> str | None:
    """What is wrong with the numbers that losses take as they are. `halt_targets`: float32 [D]."""
    for name, values in (("quality", np.array([quality])), ("halt_targets", halt_targets)):
        wrong = values[(values < 0) | (values > 1)]
        if len(wrong):
            return f"`{name}` holds {wrong[0]:g}, expected numbers from 0 to 1, NaN where it is unknown"
    if not 0 <= tool_name_weight < np.inf:
        return f"`tool_name_weight` is {tool_name_weight:g}, expected a finite number from 0 on"
    return None


def check_types(path: str | Path, schema: pa.Schema) -> None:
    """Raise DataError where a column of a file of examples can hold nothing that EXAMPLE_SCHEMA has there."""
    for field in EXAMPLE_SCHEMA:
        found = schema.field(field.name).type if field.name in schema.names else pa.null()
        if not _can_hold(found, field.type):
            raise DataError(
                f"{path}: column `{field.name}` is {found}, expected {field.type}; write the file anew with the types of "
                "raykd.types.EXAMPLE_SCHEMA"
            )


def _can_hold(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of a type may be those of another: numbers of any width for numbers, texts for texts, lists of them."""
    kinds = pa.types
    if kinds.is_null(found):
        return True
    if kinds.is_list(expected):
        is_list = kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
        return is_list and _can_hold(found.value_type, expected.value_type)
    return kinds.is_primitive(found) or (kinds.is_string(expected) and not kinds.is_nested(found))


def with_all_columns(table: pa.Table, path: str) -> pa.Table:
    """The columns in their types, with those that older files of examples lack; the default stands where there is null.

    Raises DataError where a value of the file `path` is none of its column's type.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Example) if f.default is not dataclasses.MISSING}
    columns = []
    for field in EXAMPLE_SCHEMA:
        default = pa.scalar([] if pa.types.is_list(field.type) else defaults.get(field.name, 0), field.type)
        if field.name in table.column_names:
            try:
                columns.append(table[field.name].cast(field.type).fill_null(default))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{path}: column `{field.name}` does not fit {field.type}: {error}; write the file anew with the types "
                    "of raykd.types.EXAMPLE_SCHEMA"
                ) from error
        else:
            columns.append(pa.repeat(default, table.num_rows))
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def ids_problem(table: pa.Table, index: int, names: Sequence[str], vocab_size: int) -> str | None:
    """What is wrong with the ids of a row in these columns, or None."""
    for name in names:
        ids = _numbers(table, index, name)
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):  # nor NaN, which null is here
            return f"`{name}` holds ids from {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}: the tokenizer's"
    return None


def logprobs_problem(table: pa.Table, index: int, names: Sequence[str]) -> str | None:
    """What is wrong with the log-probabilities of a row in these columns, or None. Only a teacher's may be -inf."""
    for name in names:
        values = _numbers(table, index, name)
        may_be_missing = name != "sampled_logprobs"
        wrong = values[~(values <= MASS_TOLERANCE) | (np.isneginf(values) & (not may_be_missing))]  # NaN is wrong too
        if len(wrong):
            where_none = ", -inf where there is none" if may_be_missing else " and finite"
            return f"`{name}` holds {wrong[0]:g}, expected log-probabilities: at most 0{where_none}"
    return None


def _numbers(table: pa.Table, index: int, name: str) -> np.ndarray:
    """The list of a row; empty where it is null, or the table has no such column."""
    values = table[name][index].values if name in table.column_names else None
    return np.empty(0, np.int32) if values is None else values.to_numpy(zero_copy_only=False)
