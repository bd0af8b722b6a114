"""Have the teacher answer all prompts and keep what it says: `python -m raykd.collect --config a.yaml b.yaml key=value …`.

In:  the config and the prompts that it names (data.completions=recorded: the teacher scores the conversations).
Out: the teacher's cache (data.teacher_cache, or the run folder's), as training reads and writes it; with `--jsonl FILE` or
     `--parquet FILE` also one file of offline rows, for data.offline and for `KDDataset`: the former for people to read,
     too, the latter a fraction of its size.

`python -m raykd.collect --add-process-targets FILE.jsonl` needs no config: it writes FILE.targets.jsonl beside the file, the
same rows with the spans of their calls and reused values.

What the cache has already is skipped: run the command again to go on after an interruption. Training with the same
teacher and prompts then loads no teacher: the same run with `raykd.train --resume`, or another with the same
data.teacher_cache.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from raykd.cli import CONFIG_FILE, check_same_run, exit_code, node_labels, open_run, parse, run_folder, start_ray
from raykd.config import Config
from raykd.data.cache import TeacherCache
from raykd.data.offline_write import JsonlWriter, ParquetWriter, add_process_targets, offline_rows
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.readers import DataError
from raykd.data.sources import MISTAKE_FILE, PromptSet, prepare_prompts
from raykd.data.stream import (
    Prompts,
    Rejects,
    Stage,
    answered_stream,
    asked,
    is_answered,
    keep_new,
    plan_epoch,
    set_data_context,
    teacher_cache,
)
from raykd.tracing import quiet_ray
from raykd.training.preflight import contact_teacher
from raykd.training.resources import check_labels, check_resources
from raykd.training.stages import resolve
from teacher_serving.identity import describe, vocabulary_fingerprint

logger = logging.getLogger("raykd.collect")  # started with -m, __name__ is __main__

REPORT_EVERY_S = 10.0
EXPORT_ROWS = 256
"""Rows read from the cache together on their way to a file."""


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
        rows = self._rejects.without_unasked(rows)
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

    Raises DataError when the teacher has no answer to too large a share of the prompts, or its budget is spent.
    """
    set_data_context(config)
    cache = teacher_cache(config, prompt_set)
    plan = plan_epoch(config, prompt_set, 0, np.empty(0, np.int64), cache.index())
    missing = plan.filter(plan["cache_file"].is_null())
    collected = Collected(num_cached=plan.num_rows - missing.num_rows)
    if not missing.num_rows:
        return collected
    mistake = Path(prompt_set.folder).with_name(MISTAKE_FILE)
    mistake.unlink(missing_ok=True)
    counts = answered_stream(config, prompt_set, missing, cache, teacher or asked(config, prompt_set)).map_batches(
        Keeper,
        fn_constructor_args=(cache, Rejects.of(prompt_set.folder, prompt_set.counts, config)),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.data.num_extractors),
        num_cpus=config.data.extractor_cpus,
    )
    try:
        _follow(counts, collected, missing.num_rows)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ValueError) else error) from None
    if mistake.exists():
        raise DataError(f"{mistake.read_text(encoding='utf-8')} ({collected})")
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


def export_jsonl(config: Config, prompt_set: PromptSet, path: str) -> int:
    """Write what the cache holds for the training prompts as one JSONL file, in the order of the source; returns the rows.

    Held-out prompts are left out. Prompts without an answer are not in the cache, and so not in the file.
    """
    tokenizer = load_tokenizer(config.teacher.tokenizer_folder)
    with JsonlWriter(path, _header(config, prompt_set) | {"seed": config.run.seed}) as writer:
        for rows in _answered_rows(config, prompt_set):
            for row in offline_rows(rows, tokenizer):
                writer.write(row)
    return writer.num_rows


def export_parquet(config: Config, prompt_set: PromptSet, path: str) -> int:
    """The same as one Parquet file."""
    with ParquetWriter(path, _header(config, prompt_set)) as writer:
        for rows in _answered_rows(config, prompt_set):
            writer.write(rows)
    return writer.num_rows


def _header(config: Config, prompt_set: PromptSet) -> dict[str, Any]:
    return {
        "vocabulary_fingerprint": vocabulary_fingerprint(config.teacher.tokenizer_folder),
        "teacher_fingerprint": teacher_cache(config, prompt_set).fingerprint,
    }


def _answered_rows(config: Config, prompt_set: PromptSet) -> Iterator[pa.Table]:
    cache = teacher_cache(config, prompt_set)
    plan = plan_epoch(config, prompt_set, 0, np.empty(0, np.int64), cache.index())
    plan = plan.filter(plan["cache_file"].is_valid()).sort_by([("file", "ascending"), ("row", "ascending")])
    read = Prompts(prompt_set.folder, cache)
    for start in range(0, plan.num_rows, EXPORT_ROWS):
        rows = read(plan.slice(start, EXPORT_ROWS).combine_chunks())
        yield rows.filter(pa.array(~rows["held_out"].to_numpy()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors: ValueError for what the user can mend."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--jsonl", metavar="FILE")
    parser.add_argument("--parquet", metavar="FILE.parquet")
    parser.add_argument("--add-process-targets", metavar="FILE.jsonl")
    own, rest = parser.parse_known_args(argv)
    if own.add_process_targets:
        return _add_process_targets(own.add_process_targets)
    config, _ = parse(rest, __doc__ or "")
    if not config.data.prompts:
        raise DataError("data.offline holds the responses already: there is nothing to collect; expected data.prompts")
    if own.parquet and not own.parquet.endswith((".parquet", ".pq")):
        raise DataError(f"--parquet {own.parquet}: data.offline tells the format by the name; expected one in .parquet")
    config, _ = resolve(config)
    folder = run_folder(config)
    if (folder / CONFIG_FILE).exists():
        check_same_run(config)
    else:
        open_run(config)
    contact_teacher(config, describe(config.teacher))
    quiet_ray()
    start_ray(config)
    check_resources(config, ray.cluster_resources(), with_workers=False)
    check_labels(config, node_labels(), with_workers=False)
    prompt_set = prepare_prompts(config, folder)
    start = time.monotonic()
    collected = collect(config, prompt_set)
    print(f"{collected}; {time.monotonic() - start:.0f} s in all; kept in {teacher_cache(config, prompt_set).path}")
    for path, export in ((own.jsonl, export_jsonl), (own.parquet, export_parquet)):
        if path:
            print(f"{export(config, prompt_set, path)} rows written to {path}")
    return 0


def _add_process_targets(path: str) -> int:
    added = add_process_targets(path)
    for line, reason in added.reasons:
        logger.warning("%s:%d: kept as it is: %s", path, line, reason)
    print(f"{added.num_added} of {added.num_rows} rows got spans, {len(added.reasons)} cannot have any; in {added.file}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
