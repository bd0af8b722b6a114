"""Which trial is the best, which options mattered, and what the report says of them."""

from __future__ import annotations

import json

import pytest

from raykd.evaluation.sweep_records import State, TeacherPass, TrialRecord, best_trial
from raykd.evaluation.sweep_report import by_rank, importances, write_sweep_report
from raykd.tune_config import TuneConfig

TUNE = TuneConfig.model_validate(
    {"space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}, "loss.kd_divergence": {"choice": ["jsd", "tvd"]}}}
)


def record(
    number: int, value: float | None, rate: float, divergence: str = "jsd", state: State = "done", **options
) -> TrialRecord:
    settings = {"train.learning_rate": rate, "loss.kd_divergence": divergence}
    return TrialRecord(number, settings, state=state, value=value, step=10, attempts=1, **options)


RECORDS = [
    record(0, 0.4, 1e-3),
    record(1, 0.3, 2e-3, "tvd"),
    record(2, 0.2, 3e-3),
    record(3, 0.1, 4e-3, "tvd", state="stopped"),
    record(4, None, 9e-3, state="failed", message="2 steps in a row | no number"),
]


def test_the_best_is_one_that_ran_to_its_end():
    assert [best_trial(RECORDS, mode) for mode in ("min", "max")] == [RECORDS[2], RECORDS[0]]
    assert best_trial(RECORDS[3:], "min") == RECORDS[3]
    assert best_trial(RECORDS[4:], "min") is None
    assert [trial.number for trial in by_rank(RECORDS, "min")] == [2, 1, 0, 3, 4]


def test_importance_is_the_share_of_the_variance_of_ranks():
    """The rate ranks the trials exactly. Ranks 4 3 2 1: jsd 4 and 2, tvd 3 and 1, means 3 and 2, variance 1/4 of 5/4."""
    assert importances(RECORDS) == pytest.approx({"train.learning_rate": 1.0, "loss.kd_divergence": 0.2})
    assert importances(RECORDS[:2]) == {}
    assert importances([record(n, 0.5, 1e-3) for n in range(4)]) == {"train.learning_rate": 0.0, "loss.kd_divergence": 0.0}


def test_the_report_has_every_trial_and_says_what_the_teacher_did(tmp_path):
    write_sweep_report(tmp_path, TUNE, RECORDS, TeacherPass(rows=36, tokens=400, cached_rows=0))
    facts = json.loads((tmp_path / "sweep.json").read_text())
    assert facts["best"] == 2
    assert facts["teacher"] == {"rows": 36, "tokens": 400, "cached_rows": 0, "tokens_in_trials": 0}
    assert [trial["state"] for trial in facts["trials"]] == ["done", "done", "done", "stopped", "failed"]
    text = (tmp_path / "sweep.md").read_text()
    assert "36 prompts with 400 tokens, once for 5 trials" in text
    assert "| 2 | 0.2 | 10 | done | 1 | 0.003 | jsd |" in text
    assert "failed: 2 steps in a row \\| no number" in text
    for name in ("parallel-coordinates", "importance"):
        assert "train.learning_rate" in (tmp_path / f"{name}.svg").read_text()


def test_a_sweep_without_a_value_has_no_figures(tmp_path):
    write_sweep_report(tmp_path, TUNE, RECORDS[4:], TeacherPass(0, 0, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.md"]
