"""What halt and self-evaluation heads are worth: do they rank, do they mean what they say, what does halting by them cost.

In:  a model with heads, `HeadRows`.
Out: metrics with 95 % bootstrap intervals over rows. What the data cannot tell (one class only, a constant score) is absent.

    halt_auc, halt_ece, halt_brier, halt_accuracy               at the decision points of recorded drafts
    halt_loops, halt_oracle_loops, halt_quality_lost            recorded refinements, halted by the head and by the targets
    refine_loops                                                refinements of its own drafts, halted by the head
    self_evaluation_correlation, self_evaluation_ece            at the end of recorded responses that have a score
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.data.prompt_rows import load_tokenizer
from raykd.evaluation.head_rows import Drafts, HeadRows
from raykd.evaluation.metrics import Estimate, resample
from raykd.evaluation.models import ModelFiles, load_with_heads
from raykd.student.calibration import (
    accuracy,
    brier,
    correlation,
    expected_calibration_error,
    halting_cost,
    roc_auc,
)
from raykd.student.generation import refine
from raykd.student.heads import HALT
from raykd.student.model import Student
from raykd.vocabulary import compare_vocabularies, remap_ids
from teacher_serving.identity import context_limit


@dataclass(frozen=True)
class HeadOutputs:
    """What the heads of a model gave."""

    halt: list[np.ndarray]  # per row, float32 [its decision points]; empty without the head
    quality: np.ndarray  # float32 [R]; empty without the head
    refined: np.ndarray  # int64 [P] refinements (places in `HeadRows.refinements`) that the model wrote anew
    loops: np.ndarray  # int64 [P] loops that it took


def run_heads(config: Config, files: ModelFiles, rows: HeadRows, eos_ids: Sequence[int]) -> HeadOutputs:
    """Ray task: read a model's heads on all rows, and have it refine. Sets the number of torch threads of its process.

    `eos_ids`: the teacher's ids that end a turn.
    """
    torch.set_num_threads(config.train.threads_per_worker)
    disable_progress_bar()
    student = load_with_heads(config.student, files)
    student.to("cuda" if torch.cuda.is_available() else "cpu")
    match = compare_vocabularies(load_tokenizer(config.teacher.tokenizer_folder), student.tokenizer).require()
    examples = remap_ids(rows.examples, match)
    halt, quality = [], []
    with torch.inference_mode():
        for index in range(examples.num_rows):
            batch = collate_kd_batch(examples.slice(index, 1), pad_id=0).to(student.head_weight.device)
            output = student(batch.input_ids, decision_index=batch.decision_index, end_index=batch.end_index)
            if output.halt_logits is not None:
                halt.append(output.halt_logits.softmax(-1)[:, 1].cpu().numpy())
            if output.quality_logits is not None:
                quality.append(output.quality_logits.sigmoid().item())
    chosen = _to_refine(rows, config, context_limit(files.folder)) if HALT in student.heads else []
    texts = [examples["input_ids"][rows.refinements[place].row].values.to_numpy() for place in chosen]
    drafts = [rows.refinements[place] for place in chosen]
    between, ends = match.student_ids(rows.between), match.student_ids(eos_ids).tolist()
    return HeadOutputs(
        halt, np.array(quality), np.array(chosen, np.int64), _loops(student, texts, drafts, between, ends, config)
    )


def _to_refine(rows: HeadRows, config: Config, context: int) -> list[int]:
    """The first refinements whose drafts, as long as they may be, fit the context (0: no limit)."""
    if not len(rows.between):
        return []  # nothing says how a second draft is asked for
    round_tokens = config.evaluate.max_tokens + len(rows.between)
    fitting = [
        place
        for place, drafts in enumerate(rows.refinements)
        if not context or drafts.start + drafts.cap * round_tokens <= context
    ]
    return fitting[: config.evaluate.max_refined]


def _loops(
    student: Student, texts: list[np.ndarray], drafts: list[Drafts], between: np.ndarray, eos_ids: list[int], config: Config
) -> np.ndarray:
    """Loops [P] that the student takes from the prompts of these refinements, within their caps."""
    if not drafts:
        return np.empty(0, np.int64)
    refined = refine(
        student,
        [text[: own.start] for text, own in zip(texts, drafts, strict=True)],
        continue_ids=between,
        max_loops=[own.cap for own in drafts],
        halt_probability=config.halt.halt_probability,
        max_tokens=config.evaluate.max_tokens,
        temperature=0.0,
        seed=config.run.seed,
        eos_ids=eos_ids,
    )
    return np.array([len(own.drafts) for own in refined], np.int64)


# --- from outputs to metrics ----------------------------------------------------------------------------------------------


def head_estimates(rows: HeadRows, outputs: HeadOutputs, config: Config, tier: int | None = None) -> dict[str, Estimate]:
    """The metrics above; with `tier`, over the rows whose (first) refinement is of that CAWS tier."""
    chosen = np.ones(rows.examples.num_rows, dtype=bool)
    if tier is not None:
        chosen[:] = False
        firsts = [drafts for drafts in rows.refinements if drafts.first == 0]
        chosen[[drafts.row for drafts in firsts if drafts.tier == tier]] = True
    if not chosen.any():
        return {}
    times = np.zeros((1 + config.evaluate.num_bootstrap, len(chosen)), np.int64)  # how often each row is in each resample
    times[0, chosen] = 1
    times[1:, chosen] = resample(int(chosen.sum()), config.evaluate.num_bootstrap, config.run.seed)
    found: dict[str, Estimate] = {}
    for measure, row in _measures(rows, outputs, config.halt.halt_probability):
        drawn = [measure(np.repeat(np.arange(len(row)), own[row])) for own in times]
        for name in drawn[0]:
            values = np.array([values[name] for values in drawn])
            if not np.isnan(values[0]):
                low, high = np.nanquantile(values, (0.025, 0.975))
                found[name] = Estimate(float(values[0]), float(low), float(high), len(np.unique(row[chosen[row]])))
    return found


def halting_by_tier(rows: HeadRows, outputs: HeadOutputs, config: Config) -> dict[str, dict[str, Estimate]]:
    """The metrics of halting for every CAWS tier, where the refinements are of several."""
    tiers = sorted({drafts.tier for drafts in rows.refinements})
    if len(tiers) < 2 or not outputs.halt:
        return {}
    found = {f"tier {tier}": head_estimates(rows, outputs, config, tier) for tier in tiers}
    return {
        words: {name: value for name, value in estimates.items() if not name.startswith("self_evaluation")}
        for words, estimates in found.items()
    }


Measure = Callable[[np.ndarray], dict[str, float]]
"""Metrics of some of the items, given by their places, some more than once; NaN where they cannot tell."""


def _measures(rows: HeadRows, outputs: HeadOutputs, threshold: float) -> list[tuple[Measure, np.ndarray]]:
    """Each measure with the row of each of its items."""
    measures: list[tuple[Measure, np.ndarray]] = []
    if outputs.halt:
        measures += [_at_points(rows, outputs.halt, threshold), _of_refinements(rows, outputs.halt, threshold)]
    if len(outputs.loops):
        loops = outputs.loops.astype(np.float64)
        row = np.array([rows.refinements[place].row for place in outputs.refined])
        measures.append((lambda chosen: {"refine_loops": _mean(loops[chosen])}, row))
    if len(outputs.quality):
        target, said = rows.examples["quality"].to_numpy(), outputs.quality
        known = np.flatnonzero(~np.isnan(target))
        target, said = target[known], said[known]

        def of_quality(chosen: np.ndarray) -> dict[str, float]:
            return {
                "self_evaluation_correlation": correlation(said[chosen], target[chosen]),
                "self_evaluation_ece": expected_calibration_error(said[chosen], target[chosen]),
            }

        measures.append((of_quality, known))
    return measures


def _at_points(rows: HeadRows, halt: list[np.ndarray], threshold: float) -> tuple[Measure, np.ndarray]:
    said = np.concatenate(halt)
    target = rows.examples["halt_targets"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    assert len(said) == len(target), f"{len(said)} decision points were read, {len(target)} have a place for a target"
    row = np.repeat(np.arange(len(halt)), [len(own) for own in halt])
    known = ~np.isnan(target)
    said, target, row = said[known], target[known], row[known]

    def measure(chosen: np.ndarray) -> dict[str, float]:
        return {
            "halt_auc": roc_auc(said[chosen], target[chosen]),
            "halt_ece": expected_calibration_error(said[chosen], target[chosen]),
            "halt_brier": brier(said[chosen], target[chosen]),
            "halt_accuracy": accuracy(said[chosen], target[chosen], threshold=threshold),
        }

    return measure, row


def _of_refinements(rows: HeadRows, halt: list[np.ndarray], threshold: float) -> tuple[Measure, np.ndarray]:
    num_loops = np.array([drafts.num_loops for drafts in rows.refinements], np.int64)
    present = np.arange(num_loops.max(initial=0)) < num_loops[:, None]  # [B, K]
    said, scores, targets = (np.full(present.shape, np.nan) for _ in range(3))
    for place, drafts in enumerate(rows.refinements):
        own = slice(drafts.first, drafts.first + drafts.num_loops)
        said[place, : drafts.num_loops] = halt[drafts.row][own]
        targets[place, : drafts.num_loops] = rows.examples["halt_targets"][drafts.row].values.to_numpy()[own]
        scores[place, : drafts.num_loops] = drafts.scores

    def measure(chosen: np.ndarray) -> dict[str, float]:
        cost = halting_cost(said[chosen], scores[chosen], targets[chosen], num_loops[chosen], threshold=threshold)
        return {
            "halt_loops": cost.loops,
            "halt_oracle_loops": cost.oracle_loops,
            "halt_quality_lost": cost.quality_lost,
        }

    return measure, np.array([drafts.row for drafts in rows.refinements], np.int64)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
