"""Distil a student from a live teacher: `python -m raykd.train --config a.yaml b.yaml key=value … [--plan] [--resume]`.

In:  the config, and the prompts, offline files and folders of teacher and student that it names; with `init.from` the run of
     the stage before (raykd/training/stages.py).
Out: `<run.dir>/<run.name>/` with checkpoints, metrics, the teacher's cached output and manifest.json.

--plan prints what would run and starts nothing. --resume goes on from the newest checkpoint of the run. --simulate teacher,
step or both puts timed stand-ins in the place of models (raykd/training/simulated.py). A file with a
`pipeline` (configs/pipeline.yaml) is several stages, run one after the other; started again, it goes on where it stopped.
Exit code: 0 done, 1 something the user can mend, 130 or 143 stopped by SIGINT or SIGTERM after a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

from raykd.cli import (
    CONFIG_FILE,
    check_run_folder,
    check_same_run,
    connect_ray,
    exit_code,
    load_configs,
    node_labels,
    open_run,
    parse_words,
    run_folder,
    start_ray,
    without_tune,
)
from raykd.config import Config
from raykd.data.offline_stream import prepare_offline
from raykd.data.sources import prepare_prompts
from raykd.tracing import ProgressDisplay, quiet_ray
from raykd.training.checkpoint import STUDENT, CheckpointError, latest_checkpoint, read_state, verify
from raykd.training.distributed import STOP_FILE, RunRows, train_epoch
from raykd.training.preflight import Plan, check, check_disk, num_steps, print_summary
from raykd.training.resources import check_labels, check_resources
from raykd.training.simulated import with_stand_ins
from raykd.training.stages import begin_manifest, finish_manifest, read_manifest, resolve
from teacher_serving.identity import vocabulary_fingerprint

SHORT = {"--steps": "train.max_steps", "--simulate": "simulate"}

logger = logging.getLogger("raykd.train")  # started with -m, __name__ is __main__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors: ValueError for what the user can mend."""
    words, args = parse_words(argv, __doc__ or "", "--plan", "--resume", short=SHORT)
    configs = [with_stand_ins(without_tune(config)) for config in load_configs(*words)]
    if args.plan:
        for config in configs:
            plan_run(as_planned(config, configs))
        return 0
    for config in configs if len(configs) > 1 else ():
        check(as_planned(config, configs))  # what is wrong with a later stage is said before the first one runs
    for number, config in enumerate(configs):
        begun = len(configs) > 1 and (run_folder(config) / CONFIG_FILE).exists()
        if begun and is_finished(config):
            logger.info("stage %d of %d, %s, is done", number + 1, len(configs), config.run.name)
        elif code := run_stage(config, resume=begun if len(configs) > 1 else args.resume):
            return code
    return 0


def is_finished(given: Config) -> bool:
    """Whether the run of a stage came to its end, and from the parent that it would have now."""
    config, parent = resolve(given)
    check_same_run(config)
    manifest = read_manifest(run_folder(config))
    identity = parent.identity if parent else None
    return manifest is not None and manifest.checkpoint is not None and manifest.parent == identity


def as_planned(given: Config, pipeline: Sequence[Config]) -> Config:
    """The config as it would run. Where the stage before is still to run, or to end, the student is the config's own."""
    before = given.init.from_
    if before is not None and not Path(before).exists():
        return given
    if before in {str(run_folder(config)) for config in pipeline}:
        manifest = read_manifest(Path(before))
        if manifest is None or manifest.checkpoint is None:
            return given
    return resolve(given)[0]


def plan_run(config: Config) -> None:
    """Print what would run."""
    plan = check(config)
    cluster = ray.cluster_resources() if connect_ray(config) else None
    print_summary(config, plan, numbers=None, cluster=cluster)
    if cluster is not None:
        check_resources(config, cluster)
        check_labels(config, node_labels())


def run_stage(given: Config, *, resume: bool) -> int:
    """One run from its beginning, or from its newest checkpoint, to its end; returns the exit code."""
    config, parent = resolve(given)
    plan = check(config)
    check_disk(config, plan)
    check_run_folder(config, resume=resume)
    first_epoch = _check_checkpoint(run_folder(config), plan)
    quiet_ray()
    start_ray(config)
    cluster = ray.cluster_resources()
    check_resources(config, cluster)
    check_labels(config, node_labels())
    folder = open_run(config, resume=resume)  # not before: a run that cannot start leaves none behind
    prompts = prepare_prompts(config, folder) if config.data.prompts else None
    rows = RunRows(prompts, prepare_offline(config, folder, prompts) if config.data.offline else None)
    teacher, vocabulary = plan.teacher.fingerprint, plan.student_vocabulary
    facts = {"data": rows.fingerprints, "teacher": teacher, "vocabulary": vocabulary}
    begin_manifest(given, config, folder, parent, facts)
    steps = num_steps(config, sum(rows.numbers.values()))
    print_summary(config, plan, numbers=rows.numbers, cluster=cluster)

    stopped = False
    with stop_on_signals(folder) as received, _progress(config, folder, steps):
        for epoch in range(first_epoch, config.train.epochs):
            result = train_epoch(config, folder, rows, epoch=epoch, num_steps=steps, teacher=plan.teacher)
            stopped = result.stopped
            if stopped or result.step == config.train.max_steps:
                break

    checkpoint = latest_checkpoint(folder)
    if received or stopped:  # by a signal, or by whoever put the stop file there
        logger.warning("stopped; --resume goes on from %s", checkpoint)
        return 128 + (received or [signal.SIGTERM])[0]
    assert checkpoint is not None, "a run that ends leaves a checkpoint"
    finish_manifest(folder, checkpoint)
    logger.info("done: the student is in %s/student", checkpoint)
    return 0


def _check_checkpoint(run_folder: Path, plan: Plan) -> int:
    """Look at the newest checkpoint before anything starts; returns the epoch to go on with."""
    checkpoint = latest_checkpoint(run_folder)
    if checkpoint is None:
        return 0
    verify(checkpoint)
    state = read_state(checkpoint)
    found, now = state["teacher"]["fingerprint"], plan.teacher.fingerprint
    if found != now:
        raise CheckpointError(
            f"{checkpoint} was trained on teacher {state['teacher']['teacher_id']} with fingerprint {found}, now it is "
            f"{now}: its files or its settings have changed; bring them back or start another run.name"
        )
    if (found := vocabulary_fingerprint(checkpoint / STUDENT)) != plan.student_vocabulary:
        raise CheckpointError(
            f"{checkpoint} has a student with vocabulary {found}, the config's tokenizer has {plan.student_vocabulary}: the "
            "files of student.tokenizer or student.model have changed; bring them back or start another run.name"
        )
    return state["epoch"]


def _progress(config: Config, run_folder: Path, steps: int) -> contextlib.AbstractContextManager[object]:
    return ProgressDisplay(run_folder, steps) if config.tracking.progress_bar else contextlib.nullcontext()


@contextlib.contextmanager
def stop_on_signals(run_folder: Path) -> Iterator[list[int]]:
    """Have the first SIGINT or SIGTERM ask the workers for a checkpoint and an end; the second acts as ever.

    Yields the list of signals received. Only the main thread hears signals: on another (a trial of a sweep) there are none,
    and the stop file is left to whoever started it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    stop_file = run_folder / STOP_FILE
    stop_file.unlink(missing_ok=True)
    received: list[int] = []

    def ask_to_stop(number: int, frame: object) -> None:
        received.append(number)
        stop_file.touch()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(exit_code(main))
