"""What flows through a run at the rates of its config: how many teachers feed how many workers, and what the network, the
object store and the disk must take. Arithmetic alone.

In:  Config. Out: a panel of `--plan` with the clusters of sizing.CLUSTERS, each shared out so that neither side waits.

Assumed: rates do not fall with the number of engines and workers; every block goes over the network twice (teacher to
extractor, extractor to worker), which it does where the three are on different nodes; the exchange of gradients and of
anything inside an engine of several GPUs is not counted; the cache keeps what the teachers send, which hardly compresses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.panel import Panel
from rich.table import Table

from raykd.config import Config
from raykd.data.stream import bytes_per_token
from raykd.training.sizing import CLUSTERS, Layout, gpus_of_engine
from teacher_serving.identity import state_bytes_per_token


class SequenceFlow(NamedTuple):
    """Of one sequence of mean length: what one engine and one worker do a second, and its bytes."""

    per_engine: float  # sequences a second
    per_worker: float
    answer_bytes: float  # as the teacher sends it and the cache keeps it
    example_bytes: float  # as a worker reads it


def sequence_of(config: Config) -> SequenceFlow:
    """The sequence that the config's rates speak of."""
    rates = config.rates
    prompt, response = rates.prompt_tokens, rates.response_tokens
    states = (prompt + response) * state_bytes_per_token(config.teacher)
    scores = response * bytes_per_token(config.teacher.top_k)  # with 10 bytes of ids, marks or log-probabilities each
    return SequenceFlow(
        per_engine=rates.teacher_tokens_per_s / response,
        per_worker=rates.worker_tokens_per_s / (prompt + response),
        answer_bytes=scores + 2 * response + 4 * prompt + states,  # ids of the prompt
        example_bytes=scores + 6 * prompt + states,  # ids and marks of the prompt
    )


def engines_for(config: Config, num_workers: int) -> int:
    """Teacher engines that write at least what so many workers take."""
    sequence = sequence_of(config)
    return math.ceil(num_workers * sequence.per_worker / sequence.per_engine)


def balanced(config: Config, num_gpus: int) -> Layout:
    """The layout of so many GPUs with most sequences a second; of several the one with fewest teachers. `workers` 0: too few
    GPUs for one of each."""
    each, sequence = gpus_of_engine(config), sequence_of(config)
    if not each:
        return Layout(num_gpus, num_gpus, engines_for(config, num_gpus), 0)
    best, most = Layout(num_gpus, 0, 1, each), 0.0
    for teachers in range(1, num_gpus // each + 1):
        workers = num_gpus - teachers * each
        if (speed := min(teachers * sequence.per_engine, workers * sequence.per_worker)) > most:
            best, most = Layout(num_gpus, workers, teachers, each), speed
    return best


def flow_panels(config: Config) -> list[Panel]:
    """The panel; none without prompts, for which nobody is asked."""
    if not config.data.prompts:
        return []
    rates, sequence, workers = config.rates, sequence_of(config), config.train.num_workers
    table = Table(
        box=None,
        title_justify="left",
        title=f"a teacher engine writes {rates.teacher_tokens_per_s:,g} completion tokens a second, a worker goes through "
        f"{rates.worker_tokens_per_s:,g} tokens; prompts of {rates.prompt_tokens:,} and completions of "
        f"{rates.response_tokens:,} tokens\nengines that feed {workers} workers: {engines_for(config, workers)}; "
        f"the config has {config.teacher.num_replicas}. Shared out so that neither side waits:",
    )
    columns = ("GPUs", "workers", "teachers", "sequences/s", "store and network MB/s", "into a worker MB/s", "cache GB/h")
    for column in columns:
        table.add_column(column, justify="right")
    for num_gpus in CLUSTERS:
        plan = balanced(config, num_gpus)
        if plan.workers:
            speed = min(plan.teachers * sequence.per_engine, plan.workers * sequence.per_worker)
            through = speed * (sequence.answer_bytes + sequence.example_bytes) / 1e6
            table.add_row(
                str(num_gpus),
                str(plan.workers),
                f"{plan.teachers} x {plan.gpus_per_teacher}" if plan.gpus_per_teacher else f"{plan.teachers} elsewhere",
                f"{speed:,.3g}",
                f"{through:,.3g}",
                f"{speed / plan.workers * sequence.example_bytes / 1e6:,.3g}",
                f"{speed * sequence.answer_bytes * 3600 / 1e9:,.3g}",
            )
    return [Panel(table, title="at the config's rates")]
