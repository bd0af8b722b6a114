"""Have the teacher answer all prompts and keep what it says: `python -m raykd.collect --config a.yaml b.yaml key=value …`.

In:  the config and the prompts that it names (data.completions=recorded: the teacher scores the conversations).
Out: the teacher's cache (data.teacher_cache, or the run folder's), as training reads and writes it.

What the cache has already is skipped: run the command again to go on after an interruption. Training with the same
teacher and prompts then loads no teacher: the same run with `raykd.train --resume`, or another with the same
data.teacher_cache.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from raykd.cli import exit_code, open_run, parse, run_folder, start_ray
from raykd.config import Config
from raykd.data.cache import TeacherCache
from raykd.data.readers import DataError
from raykd.data.sources import PromptSet, prepare_prompts
from raykd.data.stream import (
    Rejects,
    Stage,
    answered_stream,
    is_answered,
    keep_new,
    plan_epoch,
    set_data_context,
    teacher_cache,
)
from raykd.tracing import quiet_ray
from raykd.training.preflight import check_resources
from teacher_serving.actor import teacher_stage

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 10.0


@dataclass
class Collected:
    """What a collection amounts to."""

    num_cached: int  # rows that were there before
    num_rows: int = 0  # rows answered now
    num_failed: int = 0  # rows the teacher gave nothing for
    num_tokens: int = 0  # of the answers
    teacher_seconds: float = 0.0  # summed over the teachers

    def __str__(self) -> str:
        speed = self.num_tokens / self.teacher_seconds if self.teacher_seconds else 0.0
        return (
            f"{self.num_rows} rows answered ({self.num_tokens} tokens, {speed:.0f} tokens/s and teacher), "
            f"{self.num_failed} without an answer, {self.num_cached} were there"
        )


class Keeper:
    """Stage 2 of a collection: writes what the teacher answered, passes on only numbers."""

    def __init__(self, cache: TeacherCache, rejects: Rejects) -> None:
        self._cache = cache
        self._rejects = rejects

    def __call__(self, rows: pa.Table) -> pa.Table:
        """num_rows, num_failed, num_tokens, teacher_seconds of a block."""
        rows = rows.combine_chunks()
        keep_new(rows, self._cache)
        failed = rows.filter(pa.array(~is_answered(rows)))
        self._rejects.add(rows, failed["uid"].to_pylist(), failed["finish_reason"].to_pylist())
        return pa.table(
            {
                "num_rows": [rows.num_rows - failed.num_rows],
                "num_failed": [failed.num_rows],
                "num_tokens": [len(rows["output_ids"].combine_chunks().flatten())],
                "teacher_seconds": [float(rows["teacher_seconds"].to_numpy().sum())],
            }
        )


def collect(config: Config, prompt_set: PromptSet, teacher: Stage | None = None) -> Collected:
    """Ask the teacher for every prompt that its cache does not have. Needs a Ray cluster; blocks until it is done.

    Raises DataError when the teacher has no answer to too large a share of the prompts.
    """
    set_data_context(config)
    cache = teacher_cache(config, prompt_set)
    plan = plan_epoch(config, prompt_set, 0, np.empty(0, np.int64), cache.index())
    missing = plan.filter(plan["cache_file"].is_null())
    collected = Collected(num_cached=plan.num_rows - missing.num_rows)
    if not missing.num_rows:
        return collected
    stage = teacher or partial(teacher_stage, config=config.teacher)
    counts = answered_stream(config, prompt_set, missing, cache, stage).map_batches(
        Keeper,
        fn_constructor_args=(cache, Rejects.of(prompt_set, config.data.max_rejected_fraction)),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.data.num_extractors),
        num_cpus=config.data.extractor_cpus,
    )
    try:
        _follow(counts, collected, missing.num_rows)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DataError) else error) from None
    return collected


def _follow(counts: Dataset, collected: Collected, num_missing: int) -> None:
    """Add up the blocks' numbers as they come, and say now and then how far it is."""
    reported = time.monotonic()
    for block in counts.iter_rows():
        collected.num_rows += block["num_rows"]
        collected.num_failed += block["num_failed"]
        collected.num_tokens += block["num_tokens"]
        collected.teacher_seconds += block["teacher_seconds"]
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            logger.info("%d of %d rows to go; %s", num_missing - collected.num_rows, num_missing, collected)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors: ValueError for what the user can mend."""
    config, _ = parse(argv, __doc__ or "")
    folder = open_run(config, resume=(run_folder(config) / "config.yaml").exists())
    quiet_ray()
    start_ray(config)
    check_resources(config, ray.cluster_resources(), with_workers=False)
    prompt_set = prepare_prompts(config, folder)
    start = time.monotonic()
    collected = collect(config, prompt_set)
    print(f"{collected}; {time.monotonic() - start:.0f} s in all; kept in {teacher_cache(config, prompt_set).path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
