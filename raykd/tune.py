"""Find the best options of a run: `python -m raykd.tune --config base.yaml space.yaml key=value … [--plan] [--resume]`.

In:  a run's config with a `tune` section (raykd/tune_config.py): the options that vary, a searcher, a scheduler, a metric.
Out: `<run.dir>/<run.name>/trials/<n>/`, each a run of raykd.train; `report/` with best.yaml (a file for --config), a table
     (sweep.md, sweep.json) and figures; `teacher_cache/`, which all trials read.

The teacher runs once: the command begins as raykd.collect does and fills one cache, so that no trial starts a teacher.
--resume goes on with an interrupted sweep: trials that came to an end are kept, others go on from their checkpoints, failed
ones are tried again; with a larger tune.num_trials it adds trials. Exit code: as raykd.train; 1 too when no trial came
through.

How it stands on Ray Tune: Train V2 has no Trainer inside a Tuner any more, every trial needs a driver process. A trial is
a class Trainable that calls `raykd.train.run_stage` on a thread of its actor and hands on what metrics.jsonl says. All
stopping is raykd's own (the run's stop file, a checkpoint): the actor ends only after its run. Killing it, as Tune does to
function trainables, would leave Ray Data's reservations behind for minutes. Nor is Tune's own snapshot needed to resume:
the folders are the truth. A trial that is over reports once more what it reported, which gives searcher and scheduler
back what they knew.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from raykd.cli import (
    CONFIG_FILE,
    ConfigError,
    connect_ray,
    exit_code,
    load_config,
    node_labels,
    open_run,
    parse_words,
    set_up_logging,
    start_ray,
    with_values,
)
from raykd.collect import collect
from raykd.config import Config
from raykd.data.offline_stream import prepare_offline
from raykd.data.sources import prepare_prompts
from raykd.evaluation.sweep_records import (
    TRIALS,
    TeacherPass,
    TrialRecord,
    best_trial,
    describe_record,
    read_record,
    read_records,
    read_teacher,
    share_rows,
    teacher_tokens,
    write_record,
    write_teacher,
)
from raykd.evaluation.sweep_report import print_table, teacher_line, write_best, write_sweep_report
from raykd.tracing import METRICS_FILE, quiet_ray, read_metrics
from raykd.train import run_stage, stop_on_signals
from raykd.training.distributed import STOP_FILE
from raykd.training.mishaps import off_the_main_thread
from raykd.training.preflight import check, print_summary
from raykd.training.resources import check_labels, check_resources
from raykd.training.search_space import Proposals, check_concurrency, check_sweep, without_sweep
from raykd.training.stages import resolve
from raykd.tune_config import TuneConfig
from teacher_serving.actor import teacher_environment

logger = logging.getLogger("raykd.tune")  # started with -m, __name__ is __main__

REPORT = "report"
EARLY = "early"
"""In a trial's stop file: the scheduler has put it there, not somebody who wants the sweep to go on later."""
POLL_S = 0.5
DRIVER_CPUS = 0.001
"""Of a trial's actor, which only waits. 0 is not possible: Tune reserves by placement groups, which cannot be empty."""


@dataclass(frozen=True)
class Sweep:
    """What every trial is told."""

    config: Config
    folder: Path
    environment: dict[str, str]  # of the user's process: trials run in others


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors: ValueError for what the user can mend."""
    words, args = parse_words(argv, __doc__ or "", "--plan", "--resume")
    config = load_config(*words)
    if config.tune is None:
        raise ConfigError(
            "tune: found no such section in the files, expected `tune: {space: {<path of an option>: {loguniform: "
            "[0.1, 10]}}}`; without a sweep use raykd.train"
        )
    corners = check_sweep(config)
    plan = check(resolve(corners[0])[0])
    if args.plan:
        print_summary(config, plan, numbers=None, cluster=ray.cluster_resources() if connect_ray(config) else None)
        show_plan(config.tune)
        if ray.is_initialized():
            check_concurrency(config.tune, corners, ray.cluster_resources())
        return 0
    folder = open_run(config, resume=args.resume)
    quiet_ray()
    start_ray(config)
    cluster = ray.cluster_resources()
    check_resources(without_sweep(config), cluster, with_workers=False)
    check_labels(config, node_labels())
    check_concurrency(config.tune, corners, cluster)
    teacher = ask_teacher(shared_run(config, folder), folder)
    with stop_on_signals(folder) as received:
        off_the_main_thread(lambda: run_trials(config, folder)).result()
    return finish(config, folder, teacher, received)


def shared_run(config: Config, folder: Path) -> Config:
    """The run that trials vary, with the teacher's cache of the sweep."""
    cache = config.data.teacher_cache or str(folder / "teacher_cache")
    run = without_sweep(config)
    return with_values(run, {"data.teacher_cache": cache}) if config.data.prompts else run


def trial_config(config: Config, folder: Path, record: TrialRecord) -> Config:
    """The run of a trial."""
    own = {"run.dir": str(folder / TRIALS), "run.name": str(record.number), "tracking.progress_bar": False}
    return with_values(shared_run(config, folder), record.settings | own)


def show_plan(settings: TuneConfig) -> None:
    """Print what the first trials would be."""
    total, proposals = settings.total, Proposals(settings, {})
    drawn = [TrialRecord(number, proposals.propose(number)) for number in range(min(total, 5))]
    Console().print(f"{total} trials, {settings.max_concurrent} at a time, on one pass of the teacher; the first:")
    Console().print(print_table(drawn, settings))


def ask_teacher(run: Config, folder: Path) -> TeacherPass:
    """Prepare the rows and have the teacher answer all prompts that its cache lacks. Counts earlier attempts, too."""
    prompts = prepare_prompts(run, folder) if run.data.prompts else None
    if run.data.offline:
        prepare_offline(run, folder, prompts)
    before = read_teacher(folder)
    if prompts is None:
        return TeacherPass(0, 0, 0)
    collected = collect(run, prompts)
    logger.info("the teacher for all trials: %s", collected)
    if before is None:
        done = TeacherPass(collected.num_rows, collected.num_tokens, collected.num_cached)
    else:  # what an earlier attempt answered is in the cache now
        done = replace(before, rows=before.rows + collected.num_rows, tokens=before.tokens + collected.num_tokens)
    write_teacher(folder, done)
    return done


def run_trials(config: Config, folder: Path) -> None:
    """Have Ray Tune run what is left of the sweep; blocks until it is done or the stop file of the sweep is there."""
    settings = config.tune
    assert settings is not None, "checked in main"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # metrics.jsonl has it all
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose silence still prints tables
    sweep = Sweep(config, folder, teacher_environment(config.teacher) | quiet_ray())
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the result files that are switched off
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(Trial, sweep=sweep), tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}])),
        tune_config=tune.TuneConfig(
            metric="value",
            mode=settings.mode,
            search_alg=Search(settings, folder),
            scheduler=_scheduler(config, settings, folder),
            num_samples=settings.total,
            max_concurrent_trials=settings.max_concurrent,
            reuse_actors=True,  # a trial's process loads torch and Ray for seconds
            trial_name_creator=lambda trial: f"trial-{trial.config['number']}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']}",
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder / "ray_tune"),
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()


def _scheduler(config: Config, settings: TuneConfig, folder: Path) -> TrialScheduler:
    if settings.scheduler == "none":
        return FIFOScheduler()
    return StopEarly(
        folder,
        time_attr="step",
        grace_period=settings.grace_steps or config.train.validate_every,
        reduction_factor=settings.reduction_factor,
        max_t=2**40,  # never reached: trials end by themselves
    )


class StopEarly(ASHAScheduler):
    """ASHA whose decision reaches the run as its stop file, so that it leaves with a checkpoint."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Never STOP: the trial ends by itself, soon."""
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            (self._folder / TRIALS / str(trial.config["number"]) / STOP_FILE).write_text(EARLY)
        return TrialScheduler.CONTINUE


class Search(Searcher):
    """Hands Tune one trial after the other, by number, and keeps its settings in its folder first."""

    def __init__(self, settings: TuneConfig, folder: Path) -> None:
        super().__init__(metric="value", mode=settings.mode)
        self._settings, self._folder = settings, folder
        self._earlier = {record.number: record for record in read_records(folder)}
        self._proposals = Proposals(settings, {number: record.settings for number, record in self._earlier.items()})
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial; FINISHED when there is none, or the sweep is asked to stop."""
        number = len(self._numbers)
        if number == self._settings.total or (self._folder / STOP_FILE).exists():
            return Searcher.FINISHED
        self._numbers[trial_id] = number
        settings = self._proposals.propose(number)
        if number not in self._earlier:
            write_record(self._folder, TrialRecord(number, settings))
        return {"number": number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the sampler, and book a trial whose process died too often."""
        number = self._numbers[trial_id]
        record = read_record(self._folder, number)
        if error:
            reason = record.message or "its process died"
            record = replace(record, state="failed", message=f"{reason} (started {record.attempts} times)")
            write_record(self._folder, record)
        logger.info("trial %d: %s", number, describe_record(record, self._settings.metric))
        self._proposals.tell(number, math.nan if error or result is None else result.get("value", math.nan))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the folders of the trials are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class Trial(tune.Trainable):
    """One trial: a run of raykd.train on a thread, told to Tune by what its metrics.jsonl says."""

    def setup(self, config: dict[str, Any], sweep: Sweep) -> None:
        """What Tune calls once in an actor."""
        set_up_logging()
        os.environ.update(sweep.environment)
        self._config, self._sweep = sweep.config, sweep.folder
        self._begin(config["number"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """What Tune calls for a further trial in the same actor: the run of the one before is over."""
        self._begin(new_config["number"])
        return True

    def _begin(self, number: int) -> None:
        """Begin, go on, or, where the trial is over, just tell again."""
        self._record = read_record(self._sweep, number)
        self._folder = self._sweep / TRIALS / str(number)
        self._told_step = -1
        self._run: Future[int] | None = None
        if self._record.state not in ("done", "stopped") and not (self._sweep / STOP_FILE).exists():
            self._keep(state="unfinished", message="", attempts=self._record.attempts + 1)
            (self._folder / STOP_FILE).unlink(missing_ok=True)
            self._run = off_the_main_thread(self._train)

    def _train(self) -> int:
        """What the thread does; the exit code of raykd.train. Errors: `_end` tells them apart."""
        run = trial_config(self._config, self._sweep, self._record)
        if not any(path.startswith("data.") for path in self._record.settings):
            share_rows(self._sweep, self._folder)
        with open(self._folder / "summary.txt", "w") as file, contextlib.redirect_stdout(file):
            return run_stage(run, resume=(self._folder / CONFIG_FILE).exists())

    def step(self) -> dict[str, Any]:
        """Wait for the next value of the metric, or for the end of the run."""
        while True:
            ended = self._run is None or self._run.done()  # looked at first, so that no value after it is missed
            new = self._new_values()
            if new and not (ended and len(new) == 1):
                self._told_step, value = new[0]
                return {"step": self._told_step, "value": value, "done": False}
            if ended:
                return self._end(new)
            if (self._sweep / STOP_FILE).exists() and not (self._folder / STOP_FILE).exists():
                (self._folder / STOP_FILE).touch()
            time.sleep(POLL_S)

    def _new_values(self) -> list[tuple[int, float]]:
        """(step, value) that Tune has not been told."""
        return [(step, value) for step, value in self._values() if step > self._told_step]

    def _values(self) -> list[tuple[int, float]]:
        file = self._folder / METRICS_FILE
        entries = read_metrics(file) if file.exists() else []
        assert self._config.tune is not None, "checked in main"
        metric = self._config.tune.metric
        values = ((entry["step"], entry[metric]) for entry in entries if metric in entry)
        return [(step, math.nan if value is None else value) for step, value in values]

    def _end(self, new: list[tuple[int, float]]) -> dict[str, Any]:
        """The last result. What no restart would mend ends the trial; any other error is raised, for Tune to try again."""
        if self._run is not None:
            try:
                self._book(self._run.result())
            except ValueError as error:
                self._keep(state="failed", message=str(error))
            except Exception as error:
                self._keep(message=f"{type(error).__name__}: {error}"[:500])
                raise
        step, value = new[-1] if new else (self._told_step, self._record.value)
        return {"step": step, "value": math.nan if value is None else value, "done": True}

    def _book(self, code: int) -> None:
        """Keep how a run ended that did not fail."""
        values = self._values()
        stop_file = self._folder / STOP_FILE
        if code:
            early = stop_file.exists() and stop_file.read_text() == EARLY
            self._keep(state="stopped" if early else "unfinished")
        elif not values:
            self._keep(state="failed", message=f"no entry of {METRICS_FILE} has tune.metric: the data has nothing for it")
        else:
            self._keep(state="done")

    def _keep(self, **changes: Any) -> None:
        """Write the record, with what metrics.jsonl says by now."""
        step, value = values[-1] if (values := self._values()) else (0, None)
        finite = None if value is None or math.isnan(value) else value
        self._record = replace(self._record, step=step, value=finite, teacher_tokens=teacher_tokens(self._folder), **changes)
        write_record(self._sweep, self._record)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run has checkpoints of its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see `save_checkpoint`."""


def finish(config: Config, folder: Path, teacher: TeacherPass, received: Sequence[int]) -> int:
    """Write the report, print the table; returns the exit code."""
    settings = config.tune
    assert settings is not None, "checked in main"
    records = read_records(folder)
    report = folder / REPORT
    write_sweep_report(report, settings, records, teacher)
    console = Console()
    if not console.is_terminal:  # a file or a log has no width; the default would break every cell
        console.width = 60 + 30 * (2 + len(settings.space))
    console.print(print_table(records, settings))
    console.print(teacher_line(teacher, records), soft_wrap=True)
    best = best_trial(records, settings.mode)
    if best is not None:
        name = {"run.name": f"{config.run.name}-best"}
        write_best(report / "best.yaml", with_values(shared_run(config, folder), best.settings | name), best, settings)
        console.print(f"best: trial {best.number}; its options are in {report / 'best.yaml'}", soft_wrap=True)
    if received:
        logger.warning("stopped; --resume goes on with the trials that are left")
        return 128 + received[0]
    if best is None:
        raise ConfigError(
            f"none of the {len(records)} trials came through; the first: {describe_record(records[0], settings.metric)}. "
            "Mend that and go on with --resume"
        )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
