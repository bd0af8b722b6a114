"""The only glue to Ray Train: one epoch as one `TorchTrainer.fit`, restarted from the newest checkpoint when a worker dies.

In:  Config, the prepared rows, the run folder. Out: checkpoints and metrics in the run folder; how the epoch ended.

Our checkpoints are the only truth. Each time Ray Train starts a group of workers, the callable that makes the dataset reads
the ledger of the newest checkpoint and drops what is in it before the teacher, and the workers load the same checkpoint.
Prompts and offline rows are two datasets; every worker mixes its shares of them (`feed.mixed`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.train
import torch
from ray.train.base_trainer import GenDataset
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from raykd.cli import set_up_logging
from raykd.config import Config
from raykd.data.examples import decode_spans, example_from_row, examples_to_table
from raykd.data.offline_stream import OfflineSet, offline_dataset
from raykd.data.pairs import begins_row
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.sources import PromptSet, RowCounts
from raykd.data.stream import build_dataset
from raykd.data.text_scores import Judged, judge
from raykd.student.generation import Generated, generate
from raykd.student.model import student_config
from raykd.tracing import Tracer, quiet_ray
from raykd.training.checkpoint import latest_checkpoint, read_ledger
from raykd.training.feed import Feed, mixed
from raykd.training.loop import Log, fit
from raykd.training.loss_context import make_context
from raykd.training.ranks import Ranks
from raykd.training.rollouts import KeptRollouts, RolloutRows, Score, rollout_examples
from raykd.training.trainer import Trainer, make_trainer
from raykd.vocabulary import compare_vocabularies, student_tokenizer
from teacher_serving.actor import teacher_environment
from teacher_serving.faults import VARIABLE as FAULT_VARIABLE
from teacher_serving.faults import planned_fault
from teacher_serving.types import TeacherInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_FILE = "stop"
"""While this file is in the run folder, workers write a checkpoint after their step and leave."""
MISTAKE_FILE = "mistake.txt"
"""What only the user can mend, in the words of the worker that met it: no restart of the workers would help."""

RAY_TRAIN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the user started the run
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed; the default is 2
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
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

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
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
    train.max_failures allows.
    """
    for name, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mistake = run_folder / MISTAKE_FILE
    mistake.unlink(missing_ok=True)
    train = config.train
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if train.use_gpu else {})
    environment = quiet_ray() | {name: os.environ[name] for name in (FAULT_VARIABLE,) if name in os.environ}
    settings = EpochSettings(config, run_folder, epoch, num_steps, teacher, rows.numbers)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings},
        datasets=_datasets(config, run_folder, rows, epoch),
        dataset_config=Unequal(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # A name of its own each time: Ray Train silently resumes a run of a name it knows, and we do that ourselves.
            name=f"epoch-{epoch}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run_folder / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = off_the_main_thread(trainer.fit).result()
    except ray.train.TrainingFailedError:
        if mistake.exists():
            raise _as_error(mistake) from None
        raise
    if mistake.exists():
        raise _as_error(mistake)
    assert result.return_value is not None, "the rank-0 worker returns how the epoch ended"
    return EpochResult(**result.return_value)


def _datasets(config: Config, run_folder: Path, rows: RunRows, epoch: int) -> dict[str, GenDataset]:
    """What makes each dataset at every start of the workers, without the rows in the ledger of the newest checkpoint."""
    teachers = teacher_environment()  # read here: the datasets are made in a process of Ray Train's
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


def off_the_main_thread(function: Callable[[], T]) -> Future[T]:
    """Call it on a thread. On the main one Ray Train would replace our answer to SIGINT by its own, which aborts."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    return future


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """What each worker runs: the loop, told apart from what no restart would mend."""
    settings: EpochSettings = loop_config["settings"]
    mistake = settings.run_folder / MISTAKE_FILE
    if mistake.exists():  # restarted after one: leave, so that the run ends
        return None
    try:
        return asdict(_train(settings))
    except Exception as error:
        if (users := users_mistake(error)) is not None:
            mistake.write_text(str(users), encoding="utf-8")
        raise


def users_mistake(error: BaseException | None) -> ValueError | None:
    """The ValueError at the root of `error`, through Ray's wrapping; None when it is of another kind."""
    while error is not None and not isinstance(error, ValueError):
        error = getattr(error, "cause", None) or error.__cause__
    while error is not None and isinstance(cause := getattr(error, "cause", None), ValueError):
        error = cause
    return error


def _train(settings: EpochSettings) -> EpochResult:
    set_up_logging()
    disable_progress_bar()  # of the loading of weights, which a worker does at every restart
    config, run_folder = settings.config, settings.run_folder
    torch.set_num_threads(config.train.threads_per_worker)
    ranks = Ranks.of_process_group()
    tokenizer = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
    context, projections = make_context(config, tokenizer, student_config(config.student))
    trainer = make_trainer(
        config,
        run_folder,
        num_steps=settings.num_steps,
        teacher=asdict(settings.teacher),
        ranks=ranks,
        device=get_device() if config.train.use_gpu else torch.device("cpu"),
        context=context,
        projections=projections,
    )
    trainer.progress.epoch = settings.epoch
    share = ranks.share(config.train.sequences_per_step)
    tables = mixed(rows_of_this_worker(settings.numbers), settings.numbers, share, trainer.progress.step)
    if ranks.rank == 0 and trainer.progress.step == 0:
        tables = show_an_example(tables, tokenizer)
    pad_id = tokenizer.pad_token_id
    assert pad_id is None or isinstance(pad_id, int), f"one padding token expected, found {pad_id!r}"
    feed = Feed(tables, share, config.train.max_tokens_per_micro_batch, pad_id=pad_id or 0)
    stop_file = run_folder / STOP_FILE
    rollouts = None
    if config.rollouts.prompts_per_step:
        match = compare_vocabularies(load_tokenizer(config.teacher.model), tokenizer).require()
        rollouts = rollouts_of(trainer, feed, match.student_ids(settings.teacher.eos_token_ids).tolist())
    with _tracing(config, run_folder, ranks, trainer.progress.step) as log:
        stopped = fit(
            trainer,
            feed,
            log=log,
            stop=lambda: ranks.rank == 0 and stop_file.exists(),
            before_step=planned_faults(stop_file),
            rollouts=rollouts,
        )
    return EpochResult(trainer.progress.step, stopped)


def rollouts_of(trainer: Trainer, feed: Feed, eos_ids: list[int]) -> KeptRollouts:
    """What samples, scores and batches the student's own answers to some prompts of a step (this rank's share of them).

    `eos_ids`: the student's ids that end an answer.
    """
    config, ranks, score = trainer.config, trainer.ranks, score_in_ray(trainer.config)
    options = config.rollouts
    share = ranks.share(options.prompts_per_step)

    def sample_rows(table: pa.Table, step: int) -> RolloutRows:
        table = table.filter(pa.array(begins_row(table)))  # a prompt once, beside the response to follow
        examples = [example_from_row(table, index) for index in range(min(share, table.num_rows))]
        seed = hash((config.run.seed, step, ranks.rank)) % 2**63

        def sample(prompts: list[np.ndarray]) -> list[Generated]:
            with trainer.autocast():  # sampled from what is trained
                return generate(
                    trainer.student,
                    prompts,
                    max_tokens=options.max_tokens,
                    temperature=options.temperature,
                    seed=seed,
                    eos_ids=eos_ids,
                )

        made = rollout_examples(examples, trainer.student.tokenizer, options, sample=sample, score=score, eos_ids=eos_ids)
        numbers = {"rollouts": made.rewards.size, "reward": made.rewards.sum(), "rollout_tokens": made.lengths.sum()}
        return RolloutRows(
            feed.batches(examples_to_table(made.examples)), {name: float(value) for name, value in numbers.items()}
        )

    return KeptRollouts(options.every, sample_rows)


def score_in_ray(config: Config, num_tasks: int = 4) -> Score:
    """What judges sampled responses (data/text_scores.py) in that many Ray tasks, on any CPU of the cluster.

    The tasks ask for no logical CPU: the stream's actors may hold all of them, and wait for this step in their turn.
    """
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # pyright: ignore[reportArgumentType]: none of ours
    remote: Any = ray.remote(num_cpus=0, scheduling_strategy=outside)  # its stub knows no keyword arguments
    task = remote(judge)
    options = {"caws": config.rollouts.caws, "claims": config.rollouts.claims}

    def score(texts: list[str], teacher_texts: list[str], tiers: list[int]) -> Judged:
        tiers = [tier or config.loss.caws_tier for tier in tiers]
        size = max(1, -(-len(texts) // num_tasks))
        chunks = [slice(start, start + size) for start in range(0, len(texts), size)]
        parts = ray.get([task.remote(texts[chunk], teacher_texts[chunk], tiers[chunk], **options) for chunk in chunks])
        nothing = judge([], [], [], **options)
        return Judged(*(np.concatenate(columns) for columns in zip(nothing, *parts, strict=True)))

    return score


def planned_faults(stop_file: Path) -> Callable[[int], None]:
    """What crash tests have happen before a step (teacher_serving/faults.py): `worker:exit@step=5` dies on the spot,
    `worker:wait@step=5` waits until the run is asked to stop, or killed."""
    exits, waits = (planned_fault("worker", action) for action in ("exit", "wait"))

    def before_step(step: int) -> None:
        if exits is not None and exits.strikes(step=step):
            os._exit(1)
        while waits is not None and waits.strikes(step=step) and not stop_file.exists():
            time.sleep(0.05)

    return before_step


def rows_of_this_worker(names: Iterable[str]) -> dict[str, Iterator[pa.Table]]:
    """This worker's share of each dataset, block by block, as it is delivered. All workers name them in the same order."""
    shards: dict[str, Any] = {name: ray.train.get_dataset_shard(name) for name in names}  # its stub knows no batch_size=None
    return {
        name: iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        for name, shard in shards.items()
    }


def show_an_example(tables: Iterator[pa.Table], tokenizer: PreTrainedTokenizerBase) -> Iterator[pa.Table]:
    """Hand the tables on, and log the first row as text with what its marks cover."""
    waiting = True
    for table in tables:
        if waiting and table.num_rows:
            example, waiting = example_from_row(table, 0), False
            spans = {mark.name: texts for mark, texts in decode_spans(example, tokenizer).items() if texts}
            text = tokenizer.decode(example.input_ids.tolist())
            logger.info("the first example (%d tokens):\n%s\nits marks: %s", len(example.input_ids), text, spans)
        yield table


@contextlib.contextmanager
def _tracing(config: Config, run_folder: Path, ranks: Ranks, step: int) -> Iterator[Log]:
    """Where the metrics go: on rank 0 the run's sinks, on the others nowhere."""
    if ranks.rank != 0:
        yield lambda step, metrics: None
        return
    with Tracer(
        run_folder,
        config=config.model_dump(mode="json"),
        tensorboard=config.tracking.tensorboard,
        wandb_project=config.tracking.wandb_project,
        start_step=step,
    ) as tracer:
        yield tracer.log
