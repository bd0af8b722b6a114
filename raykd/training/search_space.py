"""What a sweep tries: the settings of its trials, drawn from `tune.space`, and what can be known to be wrong with them.

In:  Config with its `tune` section. Out: per trial a dict {path of an option: value}; ConfigError before work starts.

random and grid depend on the seed and the number of the trial alone; Optuna's sampler on the results so far, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raykd.cli import ConfigError, with_values
from raykd.config import Config
from raykd.loss_config import LOSSES
from raykd.training.preflight import PreflightError
from raykd.training.resources import reserved
from raykd.tune_config import LISTS, Distribution, TuneConfig

Settings = dict[str, Any]

NOT_IN_A_SWEEP = {
    "run.name": "a trial is called by its number",
    "run.dir": "trials live in the folder of the sweep",
    "tune": "a sweep is no option of a trial",
    "stage": "every trial runs the same stage",
    "teacher": "the teacher answers once for all trials; make a sweep of its own for each teacher",
    "data.prompts": "the teacher answers once for all trials; make a sweep of its own for each file",
    "data.held_out": "trials on other held-out rows could not be compared",
    "data.max_held_out": "trials on other held-out rows could not be compared",
    "data.completions": "the teacher answers once for all trials",
    "data.on_long_prompt": "the teacher answers once for all trials",
    "data.teacher_cache": "all trials share one",
    "evaluate": "it does not change what is learned",
    "tracking": "it does not change what is learned",
    "ray": "it does not change what is learned",
}
"""Options and sections that cannot vary, and why."""

TOKEN_METRICS = (
    "accuracy/response",
    "accuracy/tool_name",
    "accuracy/json_argument",
    "response_nll",
    "teacher_agreement",
    "teacher_kl",
    "teacher_topk_mass",
    "student_topk_mass",
)
"""What a run reports of its tokens (raykd/losses/sweep.py), in training and in validation."""

OF_HEADS = {
    "halt": ("halt_auc", "halt_ece", "halt_brier", "halt_accuracy"),
    "self_evaluation": ("self_evaluation_correlation", "self_evaluation_ece"),
}
"""What validation reports of heads (raykd/training/head_metrics.py), by the loss that trains them."""


def without_sweep(config: Config) -> Config:
    """The run that the trials vary."""
    return config.model_copy(update={"tune": None})


def corners(distribution: Distribution) -> list[Any]:
    """Values that stand for all that can be drawn: those of a list, else both ends and one between."""
    [(name, values)] = distribution.items()
    if name in LISTS:
        return list(values)
    low, high = values[:2]
    if name == "randint":
        return [low, high]
    return [low, low + (values[2] if name == "quniform" else 0.382 * (high - low)), high]


def draw(distribution: Distribution, rng: np.random.Generator) -> Any:
    """One value."""
    [(name, values)] = distribution.items()
    if name in LISTS:
        return values[int(rng.integers(len(values)))]
    low, high = values[:2]
    if name == "randint":
        return int(rng.integers(low, high, endpoint=True))
    if name == "loguniform":
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))
    if name == "quniform":
        return float(low + values[2] * rng.integers(math.floor((high - low) / values[2] + 1e-9), endpoint=True))
    return float(rng.uniform(low, high))


def check_sweep(config: Config) -> list[Config]:
    """Check space and metric; returns the runs at the corners of the space, one option at an end at a time.

    Errors: ConfigError for a path that is no option, a value that the option does not take, a metric no run reports.
    """
    assert config.tune is not None, "checked by the caller"
    base, space = without_sweep(config), config.tune.space
    for path in space:
        for name, reason in NOT_IN_A_SWEEP.items():
            if path == name or path.startswith(f"{name}."):
                raise ConfigError(f"tune.space.{path}: {name} cannot vary in a sweep: {reason}; leave it out")
    first = {path: corners(distribution)[0] for path, distribution in space.items()}
    runs = []
    for path, distribution in space.items():
        for value in corners(distribution):
            try:
                runs.append(with_values(base, first | {path: value}))
            except ConfigError as error:
                raise ConfigError(f"tune.space.{path} can be {value!r}: {error}") from error
    for run in runs:
        _check_metric(config.tune, run)
    return runs


def _check_metric(tune: TuneConfig, run: Config) -> None:
    metric = tune.metric
    known = reported_metrics(run)
    if metric not in known:
        without = "; without data.held_out nothing is validated" if not run.data.held_out else ""
        raise ConfigError(
            f"tune.metric={metric!r} is reported by no run with the losses {', '.join(run.loss.weights)}{without}; expected "
            f"one of {', '.join(known)}"
        )
    weights = sorted(
        path for path in tune.space if path.startswith("loss.") and path.split(".")[1] in (*LOSSES, "schedules")
    )
    if metric.endswith("loss/total") and weights:
        raise ConfigError(
            f"tune.metric={metric} with {weights[0]} in tune.space: the total is weighed by what varies, so that trials "
            "cannot be compared; choose one loss, or validation/teacher_kl"
        )


def reported_metrics(config: Config) -> list[str]:
    """Names in metrics.jsonl that a run may report and that say how good its student is."""
    names = ["loss/total", *(f"loss/{term}" for term in config.loss.terms), *TOKEN_METRICS]
    of_heads = [name for loss, metrics in OF_HEADS.items() if loss in config.loss.weights for name in metrics]
    of_code = ["code_mode_logprob", "direct_tool_logprob"] if "code_mode_preference" in config.loss.weights else []
    validation = [f"validation/{name}" for name in (*names, *of_heads, *of_code)] if config.data.held_out else []
    return validation + names + of_code


def check_concurrency(settings: TuneConfig, runs: Sequence[Config], cluster: Mapping[str, float]) -> None:
    """The cluster has room for the trials at a time. Errors: PreflightError.

    `runs`: at the corners of the space. Of what workers leave, Ray Data gives every stream whole CPUs.
    """
    at_a_time = min(settings.max_concurrent, settings.total)
    for name in ("CPU", "GPU"):
        needed = max(_needed_by_trial(run, name, cluster) for run in runs)
        available = cluster.get(name, 0.0)
        if at_a_time * needed > available:
            fitting = int(available // needed)
            raise PreflightError(
                f"tune.max_concurrent={settings.max_concurrent}: {at_a_time} trials at a time need {at_a_time * needed:g} "
                f"{name}s ({needed:g} each), the cluster has {available:g}: "
                + (f"set tune.max_concurrent={fitting}" if fitting else "lower train.num_workers or train.cpus_per_worker")
                + ", or add nodes"
            )


def _needed_by_trial(run: Config, name: str, cluster: Mapping[str, float]) -> float:
    needed = reserved(run, has_gpu=cluster.get("GPU", 0) > 0)[name]
    streams = bool(run.data.prompts) + bool(run.data.offline)
    return needed.workers + (max(streams, math.ceil(needed.extractors)) if name == "CPU" else 0)


class Proposals:
    """Draws the settings of one trial after another. `earlier`: by number, those of an interrupted sweep, which stay."""

    def __init__(self, tune: TuneConfig, earlier: Mapping[int, Settings]) -> None:
        self._tune = tune
        self._earlier = earlier
        self._study = _Study(tune, len(earlier)) if tune.searcher == "optuna" else None

    def propose(self, number: int) -> Settings:
        """Settings of a trial; Optuna wants them asked for in order."""
        earlier = self._earlier.get(number)
        if self._study is not None:
            return self._study.ask(number, earlier)
        return self._draw(number) if earlier is None else earlier

    def tell(self, number: int, value: float) -> None:
        """What came of a trial; NaN where nothing did."""
        if self._study is not None:
            self._study.tell(number, value)

    def _draw(self, number: int) -> Settings:
        space = self._tune.space
        if self._tune.searcher == "grid":
            combinations = itertools.product(*(corners(distribution) for distribution in space.values()))
            return dict(zip(space, next(itertools.islice(combinations, number, None)), strict=True))
        # A generator for every option: with one more in the space the others stay as they were.
        return {
            path: draw(distribution, np.random.default_rng([self._tune.seed, number, *path.encode()]))
            for path, distribution in space.items()
        }


class _Study:
    """Optuna's TPE sampler. A value of a list is its place there: Optuna takes only numbers and text."""

    def __init__(self, tune: TuneConfig, num_earlier: int) -> None:
        import optuna  # slow to import; only sweeps that ask for it pay

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kinds = optuna.distributions
        self._lists = {path: corners(d) for path, d in tune.space.items() if set(d) & set(LISTS)}
        self._distributions: dict[str, Any] = {}
        for path, distribution in tune.space.items():
            [(name, values)] = distribution.items()
            if path in self._lists:
                self._distributions[path] = kinds.CategoricalDistribution(list(range(len(values))))
            elif name == "randint":
                self._distributions[path] = kinds.IntDistribution(*values)
            else:
                step = values[2] if name == "quniform" else None
                self._distributions[path] = kinds.FloatDistribution(*values[:2], log=name == "loguniform", step=step)
        direction = "minimize" if tune.mode == "min" else "maximize"
        # Settings that are given draw nothing: after an interruption the same seed would draw the first ones once more.
        seed = int(np.random.default_rng([tune.seed, num_earlier]).integers(2**31))
        self._study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
        self._failed = optuna.trial.TrialState.FAIL
        self._asked: dict[int, Any] = {}

    def ask(self, number: int, settings: Settings | None) -> Settings:
        if settings is not None:
            places = {path: values.index(settings[path]) for path, values in self._lists.items()}
            self._study.enqueue_trial(settings | places)
        trial = self._asked[number] = self._study.ask(self._distributions)
        return {path: self._lists[path][value] if path in self._lists else value for path, value in trial.params.items()}

    def tell(self, number: int, value: float) -> None:
        if math.isnan(value):
            self._study.tell(self._asked[number], state=self._failed)
        else:
            self._study.tell(self._asked[number], value)
