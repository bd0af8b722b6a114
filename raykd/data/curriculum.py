"""The latent curriculum: reasoning steps of a response give way to slots in which the student may think without words.

In:  an Example, the stage of the curriculum, the ids of the three sentinels, a random generator.
Out: an Example in which the first m steps of a turn are `<bot>` slot x (m*c) `<eot>`, everything else as it was.

Slots are inputs only (LATENT). `<bot>` and `<eot>` are RESPONSE without teacher scores: cross-entropy teaches the student to
open and to close a span; the teacher never saw one. What follows keeps its teacher scores: they are those of a teacher
that read the steps, which is what the slots are to make up for. Source: Deng et al., 2024; Hao et al., 2024 (Coconut).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raykd.config import Config
from raykd.data.detokenize import decode_tokens
from raykd.data.examples import example_from_row, examples_to_table
from raykd.sample_config import LatentConfig, LatentStage
from raykd.types import ARGUMENT_MARKS, EXAMPLE_SCHEMA, Example, Mark, Source, Span
from raykd.vocabulary import token_id

_STEP = re.compile(r"^[ \t]*(?:step[ \t]+(\d{1,9})[ \t]*[:.)]|(\d{1,9})[.)][ \t])", re.IGNORECASE | re.MULTILINE)
_LINE_END = re.compile(r"\n\s*|\Z")
_NEVER_REPLACED = int(ARGUMENT_MARKS | Mark.TOOL_NAME | Mark.CODE_MODE | Mark.DIRECT_TOOL | Mark.LATENT | Mark.DECISION)


class LatentIds(NamedTuple):
    """Token ids of the sentinels."""

    begin: int
    slot: int
    end: int


def latent_ids(tokenizer: Any, config: LatentConfig) -> LatentIds:
    """Ids of `config.begin`, `config.slot` and `config.end`. Raises ValueError unless they are three tokens of their own."""
    ids = LatentIds(*(token_id(tokenizer, getattr(config, name), f"latent.{name}") for name in ("begin", "slot", "end")))
    if len(set(ids)) < 3:
        raise ValueError(
            f"latent.begin, latent.slot and latent.end are the tokens {list(ids)}; expected three different ones"
        )
    return ids


def stage_at(stages: Sequence[LatentStage], step: int) -> LatentStage | None:
    """The stage of optimizer step `step` (the first is 0); None after the last, or without any."""
    return next((stage for stage in stages if stage.until_step is None or step < stage.until_step), None)


def curriculum_rng(seed: int, uid: int, epoch: int) -> np.random.Generator:
    """Generator of a sequence in an epoch: the same on every worker, in every order, after every restart."""
    return np.random.default_rng([seed, uid % 2**64, epoch])


@dataclass(frozen=True)
class Curriculum:
    """The curriculum of a run, and what rewriting its examples takes."""

    stages: tuple[LatentStage, ...]
    ids: LatentIds
    seed: int
    tokenizer: Any  # of the examples' ids

    @staticmethod
    def of(config: Config, tokenizer: Any) -> Curriculum | None:
        """That of a run; None where it has none. Errors: ValueError of `latent_ids`."""
        if not config.latent.stages:
            return None
        return Curriculum(config.latent.stages, latent_ids(tokenizer, config.latent), config.run.seed, tokenizer)

    def apply(self, examples: pa.Table, steps: Sequence[int]) -> pa.Table:
        """EXAMPLE_SCHEMA, each row as the stage of the optimizer step that it is for wants it.

        Uids are those of the epoch: every row of every epoch has a draw of its own, whichever worker rewrites it.
        """
        rewritten = []
        for index, step in enumerate(steps):
            example, stage = example_from_row(examples, index), stage_at(self.stages, step)
            if stage is not None:
                rng, named = curriculum_rng(self.seed, example.uid, 0), example.cot_steps.tolist() or None
                example = rewrite(example, stage, self.ids, rng, self.tokenizer, cot_steps=named)
            rewritten.append(example)
        table = examples_to_table(rewritten)
        for name in ("teacher_seconds", "teacher_wait_seconds"):  # which an `Example` does not know
            table = table.set_column(table.column_names.index(name), EXAMPLE_SCHEMA.field(name), examples[name])
        return table


def rewrite(
    example: Example,
    stage: LatentStage,
    ids: LatentIds,
    rng: np.random.Generator,
    tokenizer: Any,
    *,
    cot_steps: Sequence[str] | None = None,
) -> Example:
    """The example with the first `stage.steps` reasoning steps of a turn replaced, with probability `stage.probability`.

    It is the first assistant turn that has so many steps, and only that. An example stays as it is (the same object) when
    the draw says so, when no turn has enough steps, when a token reaches across the ends of the steps, when they contain
    tool calls, and where another text would be another example: held-out rows, preference pairs, the student's own text.

    Args:
        tokenizer: of the example's ids; they are decoded once.
        cot_steps: the reasoning steps as the data names them, in order, word for word; None: found by `find_steps`.
    """
    drawn = rng.random() < stage.probability
    if not drawn or example.held_out or example.pair or example.source == Source.STUDENT:
        return example
    for turn in _turns(example.marks):
        text, offsets = decode_tokens(tokenizer, example.input_ids[turn.start : turn.end])
        steps = find_steps(text) if cot_steps is None else _locate(text, cot_steps)
        if len(steps) >= stage.steps:
            first, last = steps[0], steps[stage.steps - 1]
            tokens = _whole_tokens(offsets, Span(first.start, last.end))
            if tokens is None:
                return example
            replaced = Span(turn.start + tokens.start, turn.start + tokens.end)
            if (example.marks[replaced.start : replaced.end] & _NEVER_REPLACED).any():
                return example
            return _replace(example, replaced, stage.steps * stage.slots, ids)
    return example


def find_steps(text: str) -> list[Span]:
    """Characters of the reasoning steps of a response: lines "Step 1: ...", or "1. ...", numbered from 1 without a gap.

    A step reaches to the next one. The last one ends with its line, so that no part of the answer passes for it; the white
    space after a step belongs to it.
    """
    found: list[re.Match[str]] = []
    for match in _STEP.finditer(text):
        if int(match[1] or match[2]) == len(found) + 1:
            found.append(match)
    starts = [match.start() for match in found]
    if not starts:
        return []
    end = _LINE_END.search(text, found[-1].end())
    assert end is not None, "every text has an end"
    return [Span(*ends) for ends in zip(starts, [*starts[1:], end.end()], strict=True)]


def _locate(text: str, steps: Sequence[str]) -> list[Span]:
    """Characters of given steps, each after the one before it; up to the first that is not there."""
    spans: list[Span] = []
    for step in steps:
        start = text.find(step, spans[-1].end if spans else 0)
        if start < 0 or not step:
            break
        end = _LINE_END.match(text, start + len(step))
        spans.append(Span(start, end.end() if end else start + len(step)))
    return spans


def _turns(marks: np.ndarray) -> list[Span]:
    """Runs of response tokens."""
    edges = np.flatnonzero(np.diff(((marks & Mark.RESPONSE) != 0).astype(np.int8), prepend=0, append=0))
    return [Span(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _whole_tokens(offsets: np.ndarray, characters: Span) -> Span | None:
    """The tokens that spell these characters and no others; None where a token reaches across an end, or none is there."""
    inside = (offsets[:, 0] >= characters.start) & (offsets[:, 1] <= characters.end) & (offsets[:, 0] < offsets[:, 1])
    touching = (offsets[:, 0] < characters.end) & (offsets[:, 1] > characters.start)
    if not inside.any() or (touching & ~inside).any():
        return None
    indices = np.flatnonzero(inside)
    return Span(int(indices[0]), int(indices[-1]) + 1)


def _replace(example: Example, replaced: Span, num_slots: int, ids: LatentIds) -> Example:
    """The tokens `replaced` (all RESPONSE) give way to `<bot>` slot x num_slots `<eot>`; every column follows."""
    axis = _Axis(example, replaced, num_slots)
    in_sets = axis.kept[example.set_position]
    set_of_id = np.repeat(in_sets, example.set_sizes)
    assert axis.kept[example.grammar_position].all(), "steps with the arguments of a call are not replaced"
    return replace(
        example,
        input_ids=axis.tokens(example.input_ids, [ids.begin, *[ids.slot] * num_slots, ids.end]),
        marks=axis.tokens(example.marks, [Mark.RESPONSE, *[Mark.LATENT] * num_slots, Mark.RESPONSE]),
        topk_ids=axis.scores(example.topk_ids, 0),
        topk_logprobs=axis.scores(example.topk_logprobs, -np.inf),
        log_tail=axis.scores(example.log_tail, 0.0) if len(example.log_tail) else example.log_tail,
        set_position=axis.position[example.set_position[in_sets]],
        set_kind=example.set_kind[in_sets],
        set_sizes=example.set_sizes[in_sets],
        set_ids=example.set_ids[set_of_id],
        grammar_position=axis.position[example.grammar_position],
        teacher_hidden=axis.states(example.teacher_hidden),
    )


class _Axis:
    """From the old axis of tokens to the new one."""

    def __init__(self, example: Example, replaced: Span, num_slots: int) -> None:
        length = len(example.input_ids)
        is_response = (example.marks & Mark.RESPONSE) != 0
        self.cut = replaced
        self.inserted = num_slots + 2
        self.kept = np.ones(length, dtype=bool)  # [T]
        self.kept[replaced.start : replaced.end] = False
        shift = np.where(np.arange(length) < replaced.start, 0, self.inserted - (replaced.end - replaced.start))
        self.position = (np.arange(length) + shift).astype(np.int32)  # [T] new index of every token that is kept
        self.responses_before = int(is_response[: replaced.start].sum())
        self.responses_through = int(is_response[: replaced.end].sum())

    def tokens(self, values: np.ndarray, inserted: Sequence[int]) -> np.ndarray:
        """A column with an entry per token [T]."""
        new = np.asarray(inserted, dtype=values.dtype)
        return np.concatenate([values[: self.cut.start], new, values[self.cut.end :]])

    def scores(self, values: np.ndarray, unknown: float) -> np.ndarray:
        """A column with a row per response token [R, ...]: `<bot>` and `<eot>` are two of them, of unknown score."""
        new = np.full((2, *values.shape[1:]), unknown, dtype=values.dtype)
        return np.concatenate([values[: self.responses_before], new, values[self.responses_through :]])

    def states(self, values: np.ndarray) -> np.ndarray:
        """Teacher states [L, T, H]. `<eot>` has that of the last token replaced, which predicts the same token next; the
        tokens before it have none: NaN."""
        if not len(values):
            return values
        new = np.full((values.shape[0], self.inserted, values.shape[2]), np.nan, dtype=values.dtype)
        new[:, -1] = values[:, self.cut.end - 1]
        return np.concatenate([values[:, : self.cut.start], new, values[:, self.cut.end :]], axis=1)
