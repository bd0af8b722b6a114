"""What a train worker of Ray Train does with an epoch: everything is made or restored, then `loop.fit`.

In:  EpochSettings, in a process of Ray Train's; its share of the datasets. Out: what the loop leaves in the run folder; how
     the epoch ended, or the user's mistake as a message in the run folder.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import torch
from ray.train.torch import get_device
from ray.train.v2._internal.execution.context import get_train_context
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from raykd.cli import set_up_logging
from raykd.config import Config
from raykd.data.examples import decode_spans, example_from_row
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.sources import MISTAKE_FILE
from raykd.student.model import student_config
from raykd.tracing import Tracer
from raykd.training.distributed import STOP_FILE, EpochResult, EpochSettings, TrainingError
from raykd.training.feed import Feed, mixed
from raykd.training.loop import Log, fit
from raykd.training.loss_context import make_context
from raykd.training.mishaps import planned_faults, save_on_sigterm, terminated, users_mistake
from raykd.training.ranks import Ranks
from raykd.training.sampling import rollouts_of
from raykd.training.trainer import make_trainer
from raykd.vocabulary import compare_vocabularies, student_tokenizer

logger = logging.getLogger(__name__)


def train_worker(settings: EpochSettings) -> dict[str, Any] | None:
    """The loop, told apart from what no restart would mend."""
    mistake = settings.run_folder / MISTAKE_FILE
    if not settings.run_folder.is_dir():
        raise TrainingError(
            f"{settings.run_folder} is not there on node {ray.util.get_node_ip_address()}, where a train worker is: set "
            "run.dir to a folder on storage that all nodes share"
        )
    if mistake.exists():  # restarted after one: leave, so that the run ends
        return None
    try:
        return asdict(_train(settings))
    except Exception as error:
        if (users := users_mistake(error, settings.run_folder)) is not None:
            mistake.write_text(str(users), encoding="utf-8")
        raise


def _train(settings: EpochSettings) -> EpochResult:
    set_up_logging()
    # Signals are the main thread's, on which the worker's actor answers; this is another.
    ray.get(ray.get_runtime_context().current_actor.execute.remote(save_on_sigterm))
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
    if config.rollouts.prompts_per_step and not config.simulates("step"):  # a student of noise writes nothing of use
        match = compare_vocabularies(load_tokenizer(config.teacher.tokenizer_folder), tokenizer).require()
        rollouts = rollouts_of(trainer, feed, match.student_ids(settings.teacher.eos_token_ids).tolist())
    with _tracing(config, run_folder, ranks, trainer.progress.step) as log:
        stopped = fit(
            trainer,
            feed,
            log=log,
            stop=lambda: ranks.rank == 0 and stop_file.exists(),
            before_step=planned_faults(stop_file),
            save_now=notice_of_the_end(),
            rollouts=rollouts,
        )
    return EpochResult(trainer.progress.step, stopped)


def notice_of_the_end() -> Callable[[], bool]:
    """Says yes once when this worker's process is asked to end (SIGTERM), and once for each notice that nodes of the run's
    workers will be taken away (`ray drain-node`, as autoscalers send it ahead of a reclaimed machine)."""
    # Ray's own question is a barrier of all workers; the loop's message of every step carries this one along.
    notices = get_train_context().preemption_context
    heard: set[object] = {None, False}

    def is_news() -> bool:
        news = {terminated.is_set(), notices.preemption_info and tuple(notices.preemption_info.preempted_node_ids)} - heard
        heard.update(news)
        return bool(news)

    return is_news


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
