"""The only glue to Ray Train: one epoch as one `TorchTrainer.fit`, restarted from the newest checkpoint when a worker dies.

In:  Config, the prepared rows, the run folder. Out: checkpoints and metrics in the run folder; how the epoch ended.

Our checkpoints are the only truth. Each time Ray Train starts a group of workers, the callable that makes the dataset reads
the ledger of the newest checkpoint and drops what is in it before the teacher, and the workers load the same checkpoint.
Prompts and offline rows are two datasets; every worker mixes its shares of them (`feed.mixed`).
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train
from ray.exceptions import RayActorError
from ray.train.base_trainer import GenDataset
from ray.train.torch import TorchTrainer

from raykd.config import Config
from raykd.data.offline_stream import OfflineSet, offline_dataset
from raykd.data.sources import MISTAKE_FILE, PromptSet, RowCounts
from raykd.data.stream import build_dataset
from raykd.tracing import quiet_ray
from raykd.training.checkpoint import latest_checkpoint, read_ledger
from raykd.training.mishaps import off_the_main_thread, users_mistake
from raykd.training.resources import reserved
from teacher_serving.actor import teacher_environment
from teacher_serving.faults import VARIABLE as FAULT_VARIABLE
from teacher_serving.types import TeacherInfo

logger = logging.getLogger(__name__)

ROOM_EVERY_S = 20.0
"""How often an elastic run looks for room for more workers. To start them costs the steps since the newest checkpoint."""

STOP_FILE = "stop"
"""While this file is in the run folder, workers write a checkpoint after their step and leave."""

RAY_TRAIN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the user started the run
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed; the default is 2
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the runs are on the Train page of the dashboard
}


class TrainingError(ValueError):
    """A worker met what only the user can mend."""


@dataclass(frozen=True)
class RunRows:
    """What a run trains on: prompts, offline rows, or both."""

    prompts: PromptSet | None = None
    offline: OfflineSet | None = None

    @property
    def numbers(self) -> dict[str, int]:
        """Rows of each kind that there is, in an epoch."""
        kinds = {"prompts": self.prompts, "offline": self.offline}
        return {name: rows.num_train for name, rows in kinds.items() if rows is not None}

    @property
    def fingerprints(self) -> dict[str, str]:
        """What they hold, of each kind that there is."""
        kinds = {"prompts": self.prompts, "offline": self.offline}
        return {name: rows.fingerprint for name, rows in kinds.items() if rows is not None}


@dataclass(frozen=True)
class EpochSettings:
    """What every worker is told."""

    config: Config
    run_folder: Path
    epoch: int
    num_steps: int  # of the whole run
    teacher: TeacherInfo
    numbers: dict[str, int]  # rows of an epoch, by the name of their dataset


@dataclass(frozen=True)
class EpochResult:
    """How an epoch ended. `step` is the run's, after it."""

    step: int
    stopped: bool


class Unequal(ray.train.DataConfig):
    """Splits the stream over the workers without dropping rows: Ray's own way evens the shares by leaving rows out."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        for name, dataset in datasets.items():
            dataset.set_name(f"{self._run}-{name}")  # on the dashboard
        shards = {
            name: dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for name, dataset in datasets.items()
        }
        return [{name: shards[name][rank] for name in shards} for rank in range(world_size)]


def train_epoch(
    config: Config, run_folder: Path, rows: RunRows, *, epoch: int, num_steps: int, teacher: TeacherInfo
) -> EpochResult:
    """Run one pass over the rows, from the newest checkpoint on; blocks until it is done.

    Errors: TrainingError for what the user can mend; ray.train.TrainingFailedError when workers died more often than
    train.max_failures allows, ray.exceptions.RayActorError when Ray Train's controller did.
    """
    failures = 0
    while True:
        try:
            return _train_once(config, run_folder, rows, epoch, num_steps, teacher)
        except RayActorError:  # the controller starts workers again, nobody the controller
            failures += 1
            if failures > config.train.max_failures:
                raise
            logger.warning("Ray Train's controller died; the epoch goes on from %s", latest_checkpoint(run_folder))


def _train_once(
    config: Config, run_folder: Path, rows: RunRows, epoch: int, num_steps: int, teacher: TeacherInfo
) -> EpochResult:
    for name, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mistake = run_folder / MISTAKE_FILE
    mistake.unlink(missing_ok=True)
    train = config.train
    environment = quiet_ray() | {name: os.environ[name] for name in (FAULT_VARIABLE,) if name in os.environ}
    settings = EpochSettings(config, run_folder, epoch, num_steps, teacher, rows.numbers)
    trainer = TorchTrainer(
        lambda shown: _work(settings),
        train_loop_config=config.model_dump(mode="json"),  # what the dashboard shows: it has none of our classes
        datasets=_datasets(config, run_folder, rows, epoch),
        dataset_config=Unequal(config.run.name),
        scaling_config=scaling(config),
        run_config=ray.train.RunConfig(
            # A name of its own each time: Ray Train silently resumes a run of a name it knows, and we do that ourselves.
            name=f"{config.run.name}-epoch-{epoch}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run_folder / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = off_the_main_thread(trainer.fit).result()
    except ray.train.TrainingFailedError as error:
        if mistake.exists():
            raise _as_error(mistake) from None
        # Where a worker could write no message: the folder is not to be seen from its node.
        failures = error.worker_failures.values() if isinstance(error, ray.train.WorkerGroupError) else ()
        for failure in failures:
            if (users := users_mistake(failure, run_folder)) is not None:
                raise TrainingError(str(users)) from None
        raise
    if mistake.exists():
        raise _as_error(mistake)
    assert result.return_value is not None, "the rank-0 worker returns how the epoch ended"
    return EpochResult(**result.return_value)


def _work(settings: EpochSettings) -> dict[str, Any] | None:
    from raykd.training.worker import train_worker  # here, for no other process of Ray Train's needs models and losses

    return train_worker(settings)


@dataclass
class LeavingRoom(ray.train.ScalingConfig):
    """Between some and many workers, but never so many that the rest of the run finds no room: Ray Train is served before
    Ray Data, and would take all that a node's loss has left. `rest`: CPUs and GPUs of teachers and extractors."""

    rest: Mapping[str, float] = field(default_factory=dict)

    @property
    def max_workers(self) -> int:
        """As many as the cluster has room for now. Asked at every look of Ray Train's at the cluster."""
        cluster = ray.cluster_resources()
        each = cast("Mapping[str, float]", self.resources_per_worker or {})  # a search space only in Ray's own annotation
        room = [(cluster.get(name, 0) - self.rest.get(name, 0)) // amount for name, amount in each.items() if amount]
        return int(max(self.min_workers, min(super().max_workers, *room)))


def scaling(config: Config) -> ray.train.ScalingConfig:
    """How many workers Ray Train starts, on what."""
    train = config.train
    each = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if train.use_gpu else {})
    common = {"use_gpu": train.use_gpu, "resources_per_worker": each, "label_selector": train.node_labels}
    if train.min_workers is None:
        return ray.train.ScalingConfig(num_workers=train.num_workers, **common)
    needed = reserved(config, has_gpu=ray.cluster_resources().get("GPU", 0) > 0)
    rest = {name: parts.teachers + parts.extractors for name, parts in needed.items()}
    between = (train.min_workers, train.num_workers)
    return LeavingRoom(num_workers=between, elastic_resize_monitor_interval_s=ROOM_EVERY_S, rest=rest, **common)


def _datasets(config: Config, run_folder: Path, rows: RunRows, epoch: int) -> dict[str, GenDataset]:
    """What makes each dataset at every start of the workers, without the rows in the ledger of the newest checkpoint."""
    teachers = teacher_environment(config.teacher)  # read here: the datasets are made in a process of Ray Train's
    prompts, offline = rows.prompts, rows.offline
    datasets: dict[str, GenDataset] = {}
    if prompts is not None:
        beside = offline.counts if offline is not None else RowCounts()
        datasets["prompts"] = lambda: build_dataset(config, prompts, epoch, _consumed(run_folder), teachers, beside)
    if offline is not None:
        others = prompts.counts if prompts is not None else RowCounts()
        datasets["offline"] = lambda: offline_dataset(config, offline, epoch, _consumed(run_folder), others)
    return datasets


def _consumed(run_folder: Path) -> np.ndarray:
    return read_ledger(latest_checkpoint(run_folder))


def _as_error(mistake: Path) -> TrainingError:
    no_room = f"{mistake.parent}: not even a message could be written: make room on the disk and go on with --resume"
    return TrainingError(mistake.read_text(encoding="utf-8") or no_room)
