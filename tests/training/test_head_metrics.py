"""What validation says of the heads: the numbers are those of the student's own outputs, whoever holds the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raykd.config import Config
from raykd.training.loop import validate
from raykd.training.trainer import Trainer
from raykd.types import EXAMPLE_SCHEMA, Mark
from tests.training.tiny_run import make_config, make_feed, make_rows, run, run_on_two_ranks

LOSS = {"halt": 0.1, "self_evaluation": 0.1}
NAMES = {"halt_auc", "halt_ece", "halt_brier", "halt_accuracy", "self_evaluation_correlation", "self_evaluation_ece"}
THRESHOLD = 0.4


def config_of(student_path: Path, **train) -> Config:
    train = {"learning_rate": 1e-4, "validate_every": 1, "max_tokens_per_micro_batch": 24} | train
    return make_config(student_path, loss=LOSS, train=train, halt={"halt_probability": THRESHOLD})


def scored_rows(num_rows: int, *, seed: int, held_out: bool = False) -> pa.Table:
    """Rows with two decision points each, one of a known target in every second row, and a quality in two rows of three."""
    random = np.random.default_rng(seed)
    rows = make_rows(num_rows, seed=seed, held_out=held_out).to_pylist()
    for index, row in enumerate(rows):
        row["marks"] = [mark | Mark.DECISION if place in (2, 3) else mark for place, mark in enumerate(row["marks"])]
        row["halt_targets"] = [float(random.integers(2)), float("nan") if index % 2 else random.random()]
        row["quality"] = random.random() if index % 3 else float("nan")
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def by_hand(trainer: Trainer, table: pa.Table) -> dict[str, float]:
    """The metrics from one pass over each row alone, by their definitions."""
    halt, quality = [], []
    trainer.student.eval()
    for row in table.to_pylist():
        with torch.no_grad():
            ids = torch.tensor([row["input_ids"]])
            output = trainer.student(ids, torch.tensor([2, 3]), torch.tensor([ids.shape[1] - 1]))
        assert output.halt_logits is not None
        assert output.quality_logits is not None
        said = torch.sigmoid(output.halt_logits[:, 1] - output.halt_logits[:, 0])
        halt += zip(said.tolist(), row["halt_targets"], strict=True)
        quality.append((torch.sigmoid(output.quality_logits).item(), row["quality"]))
    trainer.student.train()
    halt, quality = (np.array([point for point in points if not np.isnan(point[1])]) for points in (halt, quality))
    said, target = halt.T
    order = [(p > n) + 0.5 * (p == n) for p in said[target >= 0.5] for n in said[target < 0.5]]
    return {
        "halt_auc": float(np.mean(order)),
        "halt_ece": calibration_error(halt),
        "halt_brier": float(np.mean((said - target) ** 2)),
        "halt_accuracy": float(np.mean((said >= THRESHOLD) == (target >= 0.5))),
        "self_evaluation_correlation": float(np.corrcoef(quality.T)[0, 1]),
        "self_evaluation_ece": calibration_error(quality),
    }


def calibration_error(points: np.ndarray) -> float:
    """Weighted mean, over tenths of the probability, of |mean said - mean true|."""
    tenth = np.floor(points[:, 0] * 10)
    parts = [points[tenth == number] for number in np.unique(tenth)]
    return sum(len(part) / len(points) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in parts)


def of_heads(metrics: dict[str, float]) -> dict[str, float]:
    known = {f"validation/{name}" for name in NAMES}
    return {name.removeprefix("validation/"): value for name, value in metrics.items() if name in known}


def test_validation_logs_what_the_heads_are_worth(student_path, tmp_path):
    held_out = scored_rows(9, seed=9, held_out=True)
    trainer, logged = run(config_of(student_path), tmp_path, [held_out, scored_rows(8, seed=1)])
    assert len(make_feed(trainer, []).batches(held_out)) > 1
    measured = of_heads(logged[-1][1])
    expected = by_hand(trainer, held_out)
    assert measured.keys() == NAMES
    assert measured == pytest.approx(expected, abs=1e-5)
    assert 0 < expected["halt_accuracy"] < 1
    assert not any(name in NAMES for _, metrics in logged for name in metrics), "training entries have none"


def test_ranks_bring_their_points_together_though_one_has_none(student_path, tmp_path):
    held_out, rows = scored_rows(9, seed=9, held_out=True), scored_rows(8, seed=1)
    _, logged = run(config_of(student_path), tmp_path / "one", [held_out, rows])
    expected = of_heads(logged[-1][1])
    first, second = rows.slice(0, 4), rows.slice(4)
    halves = [[held_out.slice(0, 5), first], [held_out.slice(5), second]]
    for name, tables in (("halves", halves), ("none", [[first], [held_out, second]])):
        _, logged = run_on_two_ranks(config_of(student_path), tmp_path / name, tables)
        assert of_heads(logged[-1][1]) == pytest.approx(expected, abs=1e-4), name


def test_what_the_data_cannot_tell_is_left_out(student_path, tmp_path):
    rows = scored_rows(4, seed=9, held_out=True).to_pylist()
    for row in rows:
        row["halt_targets"], row["quality"] = [1.0, 1.0], 0.5
    trainer, _ = run(config_of(student_path, max_steps=1), tmp_path, [scored_rows(8, seed=1)])
    measured = measure(trainer, pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA))
    assert NAMES - measured.keys() == {"halt_auc", "self_evaluation_correlation"}
    assert NAMES & measure(trainer, make_rows(4, held_out=True)).keys() == set()


def test_a_run_without_heads_logs_nothing_about_them(student_path, tmp_path):
    config = make_config(student_path, train={"validate_every": 1})
    _, logged = run(config, tmp_path, [scored_rows(9, seed=9, held_out=True), scored_rows(8, seed=1)])
    assert any("validation/loss/kd" in metrics for _, metrics in logged)
    assert not any(of_heads(metrics) for _, metrics in logged)


def measure(trainer: Trainer, held_out: pa.Table) -> dict[str, float]:
    feed = make_feed(trainer, [])
    feed.held_out = [held_out]
    return validate(trainer, feed)
