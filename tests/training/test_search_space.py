"""What a sweep draws, and what is refused before it begins."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from raykd.cli import ConfigError, with_values
from raykd.config import Config
from raykd.training.preflight import PreflightError
from raykd.training.search_space import Proposals, check_concurrency, check_sweep, corners, reported_metrics
from raykd.tune_config import TuneConfig
from tests.training.tiny_run import make_config, save_student

SPACE = {
    "loss.kd": {"loguniform": [0.1, 10]},
    "train.weight_decay": {"uniform": [0.0, 0.2]},
    "train.warmup_steps": {"randint": [0, 3]},
    "loss.kd_beta": {"quniform": [0.0, 1.0, 0.25]},
    "loss.kd_divergence": {"choice": ["forward_kl", "jsd"]},
}


@pytest.fixture(scope="module")
def student_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("space") / "student"
    save_student(path)
    return path


def sweep(student_path: Path, space: dict, *, data: dict | None = None, **options) -> Config:
    return make_config(student_path, data=data or {"held_out": "none"}, tune={"space": space, **options})


def settings(searcher: str, numbers: range, earlier: dict | None = None, **options) -> list[dict]:
    proposals = Proposals(TuneConfig.model_validate({"space": SPACE, "searcher": searcher, **options}), earlier or {})
    drawn = []
    for number in numbers:
        drawn.append(proposals.propose(number))
        proposals.tell(number, drawn[-1]["loss.kd"])
    return drawn


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_every_value_lies_in_its_distribution_and_the_seed_alone_decides(searcher):
    drawn = settings(searcher, range(30), seed=1)
    assert all(0.1 <= trial["loss.kd"] <= 10 for trial in drawn)
    assert all(0.0 <= trial["train.weight_decay"] <= 0.2 for trial in drawn)
    assert {trial["train.warmup_steps"] for trial in drawn} == {0, 1, 2, 3}
    assert {trial["loss.kd_beta"] for trial in drawn} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {trial["loss.kd_divergence"] for trial in drawn} == {"forward_kl", "jsd"}
    assert drawn == settings(searcher, range(30), seed=1)
    assert drawn[0] != settings(searcher, range(1), seed=2)[0]


def test_loguniform_draws_as_much_below_the_geometric_mean_as_above():
    drawn = settings("random", range(400))
    assert 160 <= sum(trial["loss.kd"] < 1.0 for trial in drawn) <= 240


def test_optuna_draws_near_what_was_good():
    drawn = settings("optuna", range(40), seed=3)
    late = [trial["loss.kd"] for trial in drawn[25:]]
    assert sum(value < 1.0 for value in late) >= 12  # the value told is loss.kd itself, the lowest is the best


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_an_interrupted_sweep_keeps_the_settings_it_has(searcher):
    earlier = dict(enumerate(settings(searcher, range(3), seed=5)))
    drawn = settings(searcher, range(5), earlier, seed=5)
    assert drawn[:3] == list(earlier.values())
    assert drawn[3] not in drawn[:3]
    assert settings(searcher, range(3), earlier, seed=6) == drawn[:3]


def test_a_grid_has_every_combination_once():
    space = {"loss.kd": {"grid": [0.5, 1]}, "train.schedule": {"choice": ["linear", "cosine", "constant"]}}
    tune = TuneConfig.model_validate({"space": space, "searcher": "grid"})
    assert tune.total == 6
    proposals = Proposals(tune, {})
    drawn = [tuple(proposals.propose(number).values()) for number in range(6)]
    assert drawn[:4] == [(0.5, "linear"), (0.5, "cosine"), (0.5, "constant"), (1, "linear")]
    assert len(set(drawn)) == 6


def test_corners_are_both_ends_and_something_between():
    assert corners({"uniform": (0, 10)}) == [0, pytest.approx(3.82), 10]
    assert corners({"quniform": (0, 10, 5)}) == [0, 5, 10]
    assert corners({"randint": (1, 4)}) == [1, 4]
    assert corners({"choice": ("a", None)}) == ["a", None]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.kdd": {"uniform": [0, 1]}}, "loss.kdd: no such option; did you mean 'kd'"),
        ({"los.kd": {"uniform": [0, 1]}}, "los: no such option; did you mean 'loss'"),
        ({"loss.kd": {"uniform": [-1, 1]}}, "can be -1: loss.kd: found -1: Input should be greater than or equal to 0"),
        ({"train.warmup_steps": {"uniform": [1, 4]}}, "Input should be a valid integer"),
        ({"loss.kd_divergence": {"choice": ["jsd", "js"]}}, "can be 'js'"),
        ({"train.num_workers": {"choice": [1, 16]}}, "train.sequences_per_step=8 is below train.num_workers=16"),
        ({"teacher.top_k": {"choice": [4, 8]}}, "teacher cannot vary in a sweep: the teacher answers once"),
        ({"run.name": {"choice": ["a", "b"]}}, "a trial is called by its number"),
    ],
)
def test_what_a_run_would_not_take_is_refused(student_path, space, message):
    with pytest.raises(ConfigError) as error:
        check_sweep(sweep(student_path, space))
    assert message in str(error.value)


def test_options_that_need_one_another_are_judged_together(student_path):
    """loss.kd=0 alone would leave no loss; with the other option of the space there is one."""
    space = {"loss.kd": {"choice": [0, 1]}, "loss.ce_teacher": {"uniform": [0.1, 1]}}
    config = with_values(sweep(student_path, space), {"loss.tool_name": 0, "loss.ce_teacher": 0})
    assert len(check_sweep(config)) == 5


def test_trials_may_share_a_served_teacher(student_path):
    served = {"kind": "served", "app": "teacher", "tokenizer": str(student_path), "api_key_env": None}
    own = sweep(student_path, {"loss.kd": {"uniform": [0.1, 1]}})
    config = Config.model_validate({**own.model_dump(), "teacher": served})
    assert {corner.teacher.kind for corner in check_sweep(config)} == {"served"}
    assert all(corner.teacher == config.teacher for corner in check_sweep(config))


def test_a_metric_that_no_run_reports_is_refused(student_path):
    space = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    with pytest.raises(
        ConfigError, match=r"'validation/loss/halt' is reported by no run .* expected one of validation/loss"
    ):
        check_sweep(sweep(student_path, space, metric="validation/loss/halt"))
    with pytest.raises(ConfigError, match=r"without data.held_out nothing is validated"):
        check_sweep(sweep(student_path, space, data={"prompts": "none"}))
    with pytest.raises(ConfigError, match=r"validation/loss/total with loss.kd in tune.space"):
        check_sweep(sweep(student_path, {"loss.kd": {"uniform": [0, 1]}}, metric="validation/loss/total"))
    assert "validation/loss/kd" in reported_metrics(sweep(student_path, space))


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"space": {"loss.kd": {"loguniform": [0.1, 1]}}, "searcher": "grid"}, "a grid needs lists of values"),
        ({"space": {"loss.kd": {"grid": [0.1, 1]}}}, "not every combination would be tried"),
        ({"space": {"loss.kd": {"grid": [0.1, 1]}}, "searcher": "grid", "num_trials": 4}, "the grid has 2 trials"),
        ({"space": {"loss.kd": {"uniform": [0, 1]}}, "grace_steps": 4}, "with scheduler=none"),
        ({"space": {}}, "tune.space is empty"),
        ({"space": {"loss.kd": {"loguniform": [0, 1]}}}, "expected 0 < low < high"),
        ({"space": {"loss.kd": {"uniform": [1, 0]}}}, "expected low < high"),
        ({"space": {"loss.kd": {"uniform": [1]}}}, "expected [low, high], numbers"),
        ({"space": {"loss.kd": {"uniform": [0, 1], "choice": [1]}}}, "has 2 distributions"),
        ({"space": {"loss.kd": {"normal": [0, 1]}}}, "loguniform"),
    ],
)
def test_a_space_that_cannot_be_drawn_from_is_refused(student_path, tune, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(student_path, tune=tune)


def test_sections_within_sections_are_the_same_as_dotted_paths():
    nested = TuneConfig.model_validate({"space": {"loss": {"kd": {"uniform": [0, 1]}, "ce_teacher": {"choice": [1]}}}})
    assert nested.space == {"loss.kd": {"uniform": (0, 1)}, "loss.ce_teacher": {"choice": (1,)}}


def test_more_trials_at_a_time_than_the_cluster_has_cpus_for_are_refused(student_path):
    """A trial needs a CPU for each worker, of which there may be 3, and one for its stream."""
    config = sweep(student_path, {"train.num_workers": {"choice": [1, 3]}}, max_concurrent=3)
    assert config.tune is not None
    runs = check_sweep(config)
    check_concurrency(config.tune, runs, {"CPU": 12.0})
    with pytest.raises(PreflightError, match=r"3 trials at a time need 12 CPUs \(4 each\), the cluster has 8: set .*=2"):
        check_concurrency(config.tune, runs, {"CPU": 8.0})


def test_a_value_that_is_no_number_is_told_as_a_failure():
    proposals = Proposals(TuneConfig.model_validate({"space": SPACE, "searcher": "optuna"}), {})
    proposals.propose(0)
    proposals.tell(0, math.nan)
    assert proposals.propose(1)["loss.kd"] > 0
