"""Options of a sweep over a run's options (raykd/tune.py). A part of config.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from raykd.loss_config import Section

DistributionName = Literal["loguniform", "uniform", "quniform", "randint", "choice", "grid"]
Distribution = Mapping[DistributionName, Sequence[Any]]
"""One name, and its numbers or values."""
LISTS = ("choice", "grid")
"""Distributions that are a list of values; the others have a lowest and a highest."""

NO_SPACE = "expected `<path of an option>: {loguniform: [0.1, 10]}` or another of " + ", ".join(get_args(DistributionName))


class TuneConfig(Section):
    """A sweep: which options vary, who chooses their values, which trials end early, and what is best."""

    space: dict[str, dict[DistributionName, tuple[Any, ...]]]
    """The options that vary, by path, each with one distribution: {loguniform: [low, high]}, {uniform: [low, high]},
    {quniform: [low, high, step]}, {randint: [low, high]} (both ends can be drawn), {choice: [values]}, or, for
    searcher=grid, {grid: [values]}."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """random: every trial draws by itself. grid: every combination of the lists, once. optuna: its sampler (TPE) draws near
    what was good so far."""
    num_trials: int | None = Field(default=None, ge=1)
    """Trials of the sweep. None: 16, and with searcher=grid every combination."""
    max_concurrent: int = Field(default=2, ge=1)
    """Trials at a time; each has train workers of its own."""
    metric: str = Field(default="validation/teacher_kl", min_length=1)
    """What decides, by its name in metrics.jsonl; a trial counts with the last value that it reports. The default does not
    depend on the weights of the losses."""
    mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest value is the best."""
    scheduler: Literal["none", "asha"] = "none"
    """none: every trial runs to its end. asha: at steps grace_steps, grace_steps * reduction_factor, … only the best
    1/reduction_factor of the trials that came so far go on (asynchronous successive halving, Li et al., 2018)."""
    grace_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps that every trial is given under asha. None: train.validate_every."""
    reduction_factor: float = Field(default=3.0, gt=1.0)
    """See scheduler."""
    seed: int = Field(default=0, ge=0)
    """Seed of what the searcher draws. The trials train with run.seed, all with the same."""
    max_failures: int = Field(default=2, ge=0)
    """Times that a trial which died is started again, from its newest checkpoint, before it counts as failed."""

    @property
    def total(self) -> int:
        """Number of trials."""
        if self.searcher == "grid":
            return prod(len(values) for distribution in self.space.values() for values in distribution.values())
        return self.num_trials or 16

    @field_validator("space", mode="before")
    @classmethod
    def _by_path(cls, space: Any) -> Any:
        """Sections within sections (as `tune.space.loss.kd=…` on the command line makes them) as dotted paths."""
        return dict(_flat(space, "")) if isinstance(space, Mapping) else space

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: dict[str, dict[str, tuple[Any, ...]]]) -> dict[str, dict[str, tuple[Any, ...]]]:
        if not space:
            raise ValueError(f"tune.space is empty: nothing would vary; {NO_SPACE}")
        for path, distribution in space.items():
            if len(distribution) != 1:
                raise ValueError(f"tune.space.{path} has {len(distribution)} distributions; expected one")
            [(name, values)] = distribution.items()
            _check_values(f"tune.space.{path}: {name}", name, values)
        return space

    @model_validator(mode="after")
    def _check(self) -> Self:
        for path, [name] in self.space.items():
            if self.searcher == "grid" and name not in LISTS:
                raise ValueError(
                    f"tune.searcher=grid with tune.space.{path}: {name}: a grid needs lists of values; use {{grid: "
                    "[values]} there, or searcher=random"
                )
            if self.searcher != "grid" and name == "grid":
                raise ValueError(
                    f"tune.searcher={self.searcher} with tune.space.{path}: grid: not every combination would be tried; use "
                    "{choice: [values]} there, or searcher=grid"
                )
        if self.searcher == "grid" and self.num_trials is not None:
            raise ValueError(
                f"tune.num_trials={self.num_trials} with searcher=grid has no effect: the grid has {self.total} trials; "
                "leave it out, or set searcher=random"
            )
        if self.scheduler == "none" and (self.grace_steps is not None or self.reduction_factor != 3.0):
            raise ValueError(
                f"tune.grace_steps={self.grace_steps} and reduction_factor={self.reduction_factor:g} with scheduler=none: "
                "without effect; set scheduler=asha, or leave them out"
            )
        return self


def _flat(space: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Path and distribution of everything in nested mappings."""
    found = []
    for key, value in space.items():
        is_section = isinstance(value, Mapping) and value and all(isinstance(inner, Mapping) for inner in value.values())
        found += _flat(value, f"{prefix}{key}.") if is_section else [(f"{prefix}{key}", value)]
    return found


def _check_values(where: str, name: str, values: tuple[Any, ...]) -> None:
    if name in LISTS:
        if not values:
            raise ValueError(f"{where} is an empty list; expected values")
        return
    number = int if name == "randint" else (int, float)
    expected = "[low, high, step]" if name == "quniform" else "[low, high]"
    kind = "whole numbers" if name == "randint" else "numbers"
    if len(values) != expected.count(",") + 1 or not all(isinstance(value, number) for value in values):
        raise ValueError(f"{where} has {list(values)}; expected {expected}, {kind}")
    if values[0] >= values[1] or (name == "loguniform" and values[0] <= 0) or (name == "quniform" and values[2] <= 0):
        bound = {"loguniform": "0 < ", "quniform": "a step above 0 and "}.get(name, "")
        raise ValueError(f"{where} has {list(values)}; expected {bound}low < high")
