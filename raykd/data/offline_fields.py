"""The fields of an offline row: which there are, where each belongs, and whether its value can be used.

In:  a row as read from JSONL or Parquet. Out: its fields by name, checked arrays; RowError says what is wrong with a value.

| field | place | what it is |
|---|---|---|
| `prompt`, or `messages` (and `tools`) | top | raw text; or a conversation that the tokenizer's chat template renders |
| `teacher_text` | top | the response; the end-of-text token is added unless `finish_reason` is "length" |
| `rejected_text` | top | another response to the same prompt, to which `teacher_text` is preferred: the two become a pair |
| `prompt_ids`, `output_ids`, `response_mask` | top | the very tokens: nothing is tokenised, texts are compared |
| `topk_ids`, `topk_logprobs`, `log_tail`, `top_k` | top | teacher scores per output token, [T][K] or flat; null is -inf |
| `teacher_logits` | top | [T][V] or flat, reduced to the top K on reading |
| `teacher_quality_score` | top | score of the response in [0, 1] |
| `teacher_hidden_states` | top | [L][T][H], one state for every token of the sequence; null at tokens without |
| `tool_name_source` | top | schema, mask+schema, original, heuristic: the trust in the tool names |
| `spans` | top | spans of the calls and reused values in `teacher_text` (`TurnSpans`), instead of searching for them |
| `span_targets` | metadata | `{ts_mode_spans, direct_tool_spans}`: [start, end) of response tokens |
| `tool_result_fields` as an object | metadata | results of tools seen before the response, by field |
| `caws_tier` | metadata | 1, 2 or 3: latent spans that the response may have, and loops where it is a refinement |
| `loop_index`, `max_loops`, `curriculum_stage` | metadata | a loop of a refinement, for halting |
| `judge_score`, `prev_score` | metadata | scores in [0, 1] of that loop and of the one before |
| `tool_name_ids`, `gold_json_text_ids`, `tool_result_fields`, their masks | top | ids of pieces of text: compared only |
| `cot_steps` | top | reasoning steps of the response, word for word, for the latent curriculum; none: lines "Step 1: ..." |
| `uid`, `teacher_id`, `finish_reason`, `response_source` | top | as in the stream; the last: gold, teacher or student |

A row with `messages` that end with an assistant turn, and no `teacher_text`, is a whole recorded conversation: all its
assistant turns are supervised, as with data.completions=recorded, and messages may have the keys of `refinement.py`.

A field found in another place (top, `metadata`, `process_supervision`) is taken from there, with one warning per process.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raykd.data.conversation import RowError

logger = logging.getLogger(__name__)

_TOP_FIELDS = """
    prompt messages tools tool_names teacher_text rejected_text prompt_ids output_ids response_mask topk_ids topk_logprobs
    log_tail top_k teacher_logits teacher_quality_score teacher_hidden_states tool_name_source spans tool_name_ids
    tool_name_mask gold_json_text_ids mask_valid_json_tokens tool_result_fields integration_mask uid teacher_id finish_reason
    response_source training_text loss_mask teacher_reasoning teacher_reasoning_content
    cot_steps
"""
_METADATA_FIELDS = "span_targets tool_results loop_index max_loops caws_tier judge_score prev_score curriculum_stage"
_CARRIED_FIELDS = """
    metadata process_supervision id key role task_type caws_level source augmented_prompt caws_context evidence_manifest
    provenance_chain tool_calls latent_curriculum ir_ready gap_fill_metadata student_target_ids answer
"""
TOP_FIELDS = frozenset(_TOP_FIELDS.split())
METADATA_FIELDS = frozenset(_METADATA_FIELDS.split())
CARRIED_FIELDS = frozenset(_CARRIED_FIELDS.split())
"""Fields that generators write and training does not read: no reason for a warning."""


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, once per process."""
    logger.warning(text)


def gather_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row by name, wherever they stand; those that are null are left out.

    Raises RowError for a field with different values in two places, and for rows that training must not see as they are.
    """
    if any(isinstance(key, str) and key == "__header__" for key in row):
        raise RowError("a header object; expected only as the first line of a file")
    fields: dict[str, Any] = {}
    for place in ("", "metadata", "process_supervision"):
        inner = row.get(place) if place else row
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise RowError(f"`{place}` is {kind(inner)}, expected an object")
        for name, value in inner.items():
            if value is None:
                continue
            if name == "tool_result_fields" and isinstance(value, Mapping):
                name = "tool_results"
            home = "" if name in TOP_FIELDS else "metadata"
            if name not in TOP_FIELDS and name not in METADATA_FIELDS:
                if not place and name not in CARRIED_FIELDS:
                    warn_once(f"offline rows have a field {name!r} that nothing reads")
                continue
            if name in fields and fields[name] != value:
                raise RowError(f"`{name}` is there twice with different values; expected it in {home or 'the row'} only")
            if place != home:
                warn_once(f"offline rows have `{name}` in {place or 'the row'}; it belongs in {home or 'the row'}")
            fields[name] = value
    _refuse_foreign(row, fields)
    return fields


def _refuse_foreign(row: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for name, value in row.items():
        if name.startswith("teacher_reasoning") and value not in (None, "", [], {}):
            raise RowError(f"`{name}` is not empty: private reasoning of a teacher is not trained on; remove the field")
    for name in ("teacher_reasoning", "teacher_reasoning_content"):
        if fields.get(name):
            raise RowError(f"`{name}` is not empty: private reasoning of a teacher is not trained on; remove the field")
    if fields.get("training_text"):
        raise RowError(
            "`training_text` is a sequence that a curriculum has rewritten; give prompt and teacher_text (`latent` rewrites)"
        )
    mask = fields.get("loss_mask")
    if mask is not None and not (isinstance(mask, list) and all(mask)):
        raise RowError("`loss_mask` hides tokens; say what is supervised by prompt_ids, output_ids and response_mask")


def read_text(value: Any, name: str) -> str:
    """A string of valid Unicode that is not blank."""
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {kind(value)}, expected a string")
    if not value.strip():
        raise RowError(f"`{name}` is blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"`{name}` holds an unpaired surrogate at character {error.start}, expected valid Unicode") from error
    return value


def optional_string(fields: Mapping[str, Any], name: str) -> str:
    """A field that is a string, "" where it is not there."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {kind(value)}, expected a string")
    return value


def read_ids(value: Any, name: str, vocab_size: int) -> np.ndarray:
    """Token ids, int32, of the shape they have in the row (one or two dimensions)."""
    array = _array(value, name)
    if array.size and array.dtype.kind not in "iu":
        raise RowError(f"`{name}` holds {array.dtype.name} values, expected integer token ids")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        raise RowError(
            f"`{name}` holds ids from {array.min()} to {array.max()}, expected 0 to {vocab_size - 1}: the tokenizer's"
        )
    return array.astype(np.int32)


def read_mask(value: Any, name: str, length: int) -> np.ndarray:
    """A mask of 0 and 1 (or booleans), bool [length]."""
    array = _array(value, name)
    if array.shape != (length,):
        raise RowError(f"`{name}` has {array.size} entries, expected {length}")
    if array.size and (array.dtype.kind not in "iub" or not np.isin(array, (0, 1)).all()):
        raise RowError(f"`{name}` holds values other than 0 and 1")
    return array.astype(bool)


def read_floats(value: Any, name: str, *, missing: float | None = None) -> np.ndarray:
    """Numbers, float64, of the shape they have in the row; where null is allowed it becomes `missing`, perhaps NaN."""
    if missing is not None:
        value = _replace_nulls(value, missing)
    array = _array(value, name)
    if array.size and array.dtype.kind not in "iuf":
        raise RowError(f"`{name}` holds {array.dtype.name} values, expected numbers")
    array = array.astype(np.float64)
    may_be_nan = missing is not None and math.isnan(missing)
    if (np.isnan(array).any() and not may_be_nan) or (array == math.inf).any():
        raise RowError(f"`{name}` holds NaN or infinity")
    return array


def read_number(value: Any, name: str, low: float, high: float) -> float:
    """A number, or a string that spells one, between two bounds."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise RowError(f"`{name}` is {kind(value)}, expected a number from {low:g} to {high:g}")
    return number


def read_spans(value: Any, name: str, length: int) -> list[tuple[int, int]]:
    """[start, end) pairs within 0 and `length`."""
    if not isinstance(value, list):
        raise RowError(f"`{name}` is {kind(value)}, expected a list of [start, end) pairs")
    spans = []
    for pair in value:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(bound) is int for bound in pair)
        if not whole or not 0 <= pair[0] <= pair[1] <= length:
            raise RowError(f"`{name}` holds {kind(pair)}, expected [start, end) within 0 and {length}")
        spans.append((pair[0], pair[1]))
    return spans


def _array(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, list):
        raise RowError(f"`{name}` is {kind(value)}, expected a list")
    try:
        return np.array(value)
    except ValueError as error:
        raise RowError(f"`{name}` has rows of different lengths") from error


def _replace_nulls(value: Any, missing: float) -> Any:
    if isinstance(value, list):
        return [_replace_nulls(item, missing) for item in value]
    return missing if value is None else value


def kind(value: Any) -> str:
    """Type and beginning of a value, for an error."""
    return f"{type(value).__name__} {str(value)[:40]!r}"
