"""Recorded refinements and scored responses, on which halt and self-evaluation heads are judged.

In:  evaluate.refinements: rows that hold their responses (raykd/data/offline_fields.py), such as conversations with judged
     drafts (raykd/data/refinement.py); without it those of data.held_out. Rows that say nothing of heads are passed over.
Out: `HeadRows`, in the teacher's ids. Raises EvaluationError where a file that is named has nothing to judge on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.config import Config
from raykd.data.examples import Wanted, examples_to_table
from raykd.data.halt_targets import loop_caps
from raykd.data.offline_fields import gather_fields
from raykd.data.offline_rows import RowReader, read_context
from raykd.data.offline_tokens import is_recorded
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.readers import RawRow, find_files
from raykd.data.refinement import Refinement, read_refinements, row_tier
from raykd.evaluation.prompts import EvaluationError, all_rows, sample, sha256_of
from raykd.types import Example, Mark
from teacher_serving.types import TeacherInfo


@dataclass(frozen=True)
class Drafts:
    """A recorded refinement of k loops."""

    row: int  # of `HeadRows.examples`
    first: int  # its first decision point among those of the row
    scores: np.ndarray  # float64 [k] of the judge; NaN: none
    tier: int  # CAWS tier
    cap: int  # loops that it may have
    start: int  # token that its first draft begins with: those before are its prompt

    @property
    def num_loops(self) -> int:
        """k."""
        return len(self.scores)


@dataclass(frozen=True)
class HeadRows:
    """R rows with targets of the heads, and their refinements."""

    examples: pa.Table  # EXAMPLE_SCHEMA
    refinements: list[Drafts]
    between: np.ndarray  # int32: what most often stands between two drafts; empty where none has a second one
    source: dict[str, Any]  # path, sha256, number of rows


def load_head_rows(config: Config, teacher: TeacherInfo) -> HeadRows | None:
    """Read, check and tokenise the rows, at most evaluate.max_prompts drawn by run.seed; None where the data has none."""
    named = config.evaluate.refinements
    path, option = (named, "evaluate.refinements") if named else (config.data.held_out, "data.held_out")
    assert path is not None, "held-out prompts are read before"
    files = find_files(path, option)
    rows = sample([(where, row) for where, row in all_rows(files) if row.error or _names_targets(row)], config)
    kept, rejected = _examples(rows, config, teacher)
    if len(rejected) > config.data.max_rejected_fraction * len(rows):
        raise EvaluationError(
            f"{len(rejected)} of {len(rows)} rows of {option}={path} cannot be used to judge heads, more than "
            f"data.max_rejected_fraction={config.data.max_rejected_fraction}; the first: {rejected[0]}"
        )
    if not kept:
        if named:
            raise EvaluationError(
                f"evaluate.refinements={named}: found no row with judged drafts or a quality score, expected "
                "conversations with `loop` and `judge_score` on their assistant messages (raykd/data/refinement.py)"
            )
        return None
    refinements = [drafts for row, (example, found) in enumerate(kept) for drafts in _drafts(row, example, found, config)]
    gaps = Counter(gap for example, found in kept for gap in _gaps(example, found))
    return HeadRows(
        examples=examples_to_table([example for example, _ in kept]),
        refinements=refinements,
        between=np.array(gaps.most_common(1)[0][0] if gaps else (), np.int32),
        source={"path": str(path), "sha256": sha256_of(files), "num_rows": len(kept)},
    )


def _names_targets(row: RawRow) -> bool:
    """Does a row say what a head should give, as far as its keys tell?"""
    places = [row.value, row.value.get("metadata"), row.value.get("process_supervision")]
    if any(isinstance(place, Mapping) and place.keys() & {"teacher_quality_score", "loop_index"} for place in places):
        return True
    messages = row.value.get("messages")
    if isinstance(messages, str):  # a column of JSON texts
        return '"loop"' in messages or '"judge_score"' in messages
    listed = messages if isinstance(messages, list) else []
    return any(isinstance(message, Mapping) and message.keys() & {"loop", "judge_score"} for message in listed)


def _examples(
    rows: Sequence[tuple[str, RawRow]], config: Config, teacher: TeacherInfo
) -> tuple[list[tuple[Example, list[Refinement]]], list[str]]:
    """Examples that have a target of a head, each with its refinements; why there is none of other rows."""
    wanted = Wanted(halt=config.halt, caws_tier=config.loss.caws_tier)
    tokenizer = load_tokenizer(config.teacher.tokenizer_folder)
    reader = RowReader(tokenizer, max_tokens=teacher.max_model_len, wanted=wanted, pairs=False)
    kept, rejected = [], []
    for (where, row), made in zip(rows, reader.examples([row.value for _, row in rows]), strict=True):
        if row.error or isinstance(made, str):
            rejected.append(f"{where}: {row.error or made}")
        elif len(made[0].halt_targets) or not math.isnan(made[0].quality):
            kept.append((made[0], _refinements(row.value, config.loss.caws_tier)))
    return kept, rejected


def _refinements(row: Mapping[str, Any], default_tier: int) -> list[Refinement]:
    """The refinements whose loops are the decision points of a row, in order, each with its tier."""
    fields = gather_fields(row)
    found = read_refinements(read_context(fields)[0]) if is_recorded(fields) else []
    for refinement in found:
        refinement.caws_tier = refinement.caws_tier or row_tier(row) or default_tier
    return found


def _drafts(row: int, example: Example, refinements: Sequence[Refinement], config: Config) -> list[Drafts]:
    starts, decisions = _turn_starts(example), _decisions(example)
    drafts, first = [], 0
    for refinement in refinements:
        tier, max_loops = refinement.caws_tier or 0, refinement.max_loops or config.halt.max_loops
        cap = int(loop_caps(np.array([tier]), np.array([max_loops]))[0])
        start = int(starts[starts <= decisions[first]][-1])
        drafts.append(Drafts(row, first, np.array(refinement.scores), tier, cap, start))
        first += len(refinement.turns)
    assert first in (0, len(decisions)), f"{first} loops have {len(decisions)} decision points"
    return drafts


def _gaps(example: Example, refinements: Sequence[Refinement]) -> list[tuple[int, ...]]:
    """The ids between each two drafts of a refinement that no other turn of the assistant comes between."""
    starts, decisions = _turn_starts(example), _decisions(example)
    gaps, first = [], 0
    for refinement in refinements:
        own = decisions[first : first + len(refinement.turns)]
        first += len(own)
        for end, following in pairwise(own):
            begin = starts[starts > end][0]
            if not ((starts > begin) & (starts <= following)).any():
                gaps.append(tuple(example.input_ids[end + 1 : begin].tolist()))
    return gaps


def _turn_starts(example: Example) -> np.ndarray:
    """First token of each assistant turn."""
    is_response = (example.marks & Mark.RESPONSE) != 0
    return np.flatnonzero(is_response & ~np.concatenate([[False], is_response[:-1]]))


def _decisions(example: Example) -> np.ndarray:
    """Tokens at which the halt head is read."""
    return np.flatnonzero((example.marks & Mark.DECISION) != 0)
