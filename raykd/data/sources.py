"""Prompts, once and for all: the user's rows are checked, rendered and tokenised before any model loads.

In:  the configured files.
Out: a PromptSet: small Parquet files of PROMPT_ROW_SCHEMA in the run folder, an index of their usable rows, and
     rejected.jsonl with file, line and reason of every row that is not used. Raises DataError for unusable data.

Files are cut into shards which Ray tasks read in parallel; the driver sees ids, counts and reasons, never a conversation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayTaskError

from raykd.config import Config
from raykd.data.prompt_rows import (
    PROMPT_ROW_SCHEMA,
    Reject,
    RowRules,
    ShardResult,
    Work,
    part_file,
    prepare_shards,
    write_table,
)
from raykd.data.readers import DataError, SourceFile, cut, find_files
from teacher_serving.config import SeveralTeachersConfig
from teacher_serving.identity import describe, tokenizer_fingerprint

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 << 20
SHARDS_PER_TASK = 4
"""A task's process first loads a tokenizer and what that needs, for seconds: a handful of small files is one task's work."""
FORMAT_VERSION = 2
REJECTED_FILE = "rejected.jsonl"
MISTAKE_FILE = "mistake.txt"
"""What only the user can mend, in the words of whoever met it: no restart of the workers would help."""


@dataclass(frozen=True)
class RowCounts:
    """Rows of the user's files: of prompts, of offline files, or of both. The default: there are none."""

    num_train: int = 0  # to train on in an epoch
    num_rows: int = 0  # of the files
    num_rejected: int = 0  # of those, before training began

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class PromptSet:
    """Prepared prompts on disk. Token counts are those of the training prompts."""

    folder: str
    num_train: int
    num_held_out: int
    num_rejected: int
    num_contaminated: int  # rows left out of training because a held-out row has the same rendered prompt
    num_truncated: int
    num_tokens: int
    mean_prompt_tokens: float
    max_prompt_tokens: int
    num_not_selected: int = 0  # rows that hold nothing of what the stage is about
    fingerprint: str = ""  # of the uids, which hash what the teacher is given, and of what is held out

    @property
    def counts(self) -> RowCounts:
        num_rows = self.num_train + self.num_held_out + self.num_rejected + self.num_contaminated + self.num_not_selected
        return RowCounts(self.num_train, num_rows, self.num_rejected)

    def index(self) -> pa.Table:
        """One row per usable prompt, in the order of the source: file, row, uid, num_tokens, held_out."""
        return pq.read_table(Path(self.folder) / "index.parquet")

    def read(self, *, held_out: bool, limit: int | None = None) -> pa.Table:
        """The first `limit` prompts of either kind, as PROMPT_ROW_SCHEMA."""
        index = self.index()
        wanted = index["held_out"].to_numpy() == held_out
        chosen = index.filter(pa.array(wanted)).slice(0, limit)
        return read_prompt_rows(self.folder, chosen["file"].to_pylist(), chosen["row"].to_numpy())


def read_prompt_rows(folder: str | Path, files: Sequence[str], rows: np.ndarray) -> pa.Table:
    """Rows of part files by (file, row number), in the order asked, as PROMPT_ROW_SCHEMA."""
    if not files:
        return PROMPT_ROW_SCHEMA.empty_table()
    names, which = np.unique(np.asarray(files, object).astype(str), return_inverse=True)
    tables = [pq.read_table(Path(folder) / name, schema=PROMPT_ROW_SCHEMA) for name in names]
    starts = np.cumsum([0] + [table.num_rows for table in tables[:-1]])
    return pa.concat_tables(tables).take(pa.array(starts[which] + rows)).combine_chunks()


def prepare_prompts(config: Config, run_folder: str | Path) -> PromptSet:
    """Prepare the prompts of a run, or find them prepared if neither files nor settings changed since. Needs a Ray cluster.

    Raises DataError where a file cannot be read, where the share of rejected rows passes data.max_rejected_fraction, and
    where no training prompt is left.
    """
    folder = Path(run_folder) / "prompts"
    assert config.data.prompts is not None, "offline files have no prompts to prepare: see offline_stream.py"
    train = find_files(config.data.prompts, "data.prompts")
    held_out = find_files(config.data.held_out, "data.held_out") if config.data.held_out else []
    rules = RowRules(
        config.teacher.tokenizer_folder,
        config.data.completions,
        _max_tokens(config),
        config.data.on_long_prompt,
        answers_only=config.stage == "answer",
        **_teachers(config),
    )
    fingerprint = _fingerprint(rules, train, held_out, config.data.max_rejected_fraction)
    ready = _load(folder, fingerprint)
    if ready is not None:
        return ready
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards = [(shard, "train") for file in train for shard in cut(file, SHARD_BYTES)]
    shards += [(shard, "held_out") for file in held_out for shard in cut(file, SHARD_BYTES)]
    stems = [f"{kind}-{number:05d}" for number, (_, kind) in enumerate(shards)]
    work = [Work(shard, str(folder / stem), kind == "held_out") for stem, (shard, kind) in zip(stems, shards, strict=True)]
    if not work:
        raise DataError(f"data.prompts={config.data.prompts} has no row; expected at least one")
    prompt_set = _join(folder, stems, _run(work, rules), config)
    _write_json(folder / "prompt_set.json", {"fingerprint": fingerprint, "prompt_set": asdict(prompt_set)})
    return prompt_set


def _run(work: list[Work], rules: RowRules) -> list[ShardResult]:
    # DEFAULT: not in the placement group of a trial of a sweep, which has no CPU for it.
    task = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="DEFAULT")(prepare_shards)
    tasks = [work[start : start + SHARDS_PER_TASK] for start in range(0, len(work), SHARDS_PER_TASK)]
    try:
        return list(chain.from_iterable(ray.get([task.remote(part, rules) for part in tasks])))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DataError) else error) from None


def _join(folder: Path, stems: list[str], results: list[ShardResult], config: Config) -> PromptSet:
    """Leave out repeated ids and held-out prompts, write index and rejects, and refuse what has too many of these."""
    shard = np.repeat(np.arange(len(results)), [len(result.uid) for result in results])
    held_out = np.array([stem.startswith("held_out") for stem in stems])[shard]
    part, row, line, uid, key_hash, prompt_hash, num_tokens = (
        np.concatenate([getattr(result, name) for result in results])
        for name in ("part", "row", "line", "uid", "key_hash", "prompt_hash", "num_tokens")
    )
    first = np.unique(np.stack([key_hash, held_out]), axis=1, return_index=True)[1]
    duplicate = np.ones(len(uid), bool)
    duplicate[first] = False
    contaminated = ~held_out & ~duplicate & np.isin(prompt_hash, prompt_hash[held_out])

    def rejects(rows: np.ndarray, reason: str) -> list[Reject]:
        return [Reject(results[shard[i]].source, int(line[i]), reason) for i in np.flatnonzero(rows)]

    rejected = [reject for result in results for reject in result.rejected]
    not_selected = [reject for result in results for reject in result.not_selected]
    num_rows = len(uid) + len(rejected) + len(not_selected)
    rejected += rejects(duplicate, "duplicate id: an earlier row of this file has it")
    left_out = rejects(contaminated, "left out of training: the same prompt is held out (not counted as rejected)")
    _write_rejected(folder.parent / REJECTED_FILE, rejected + left_out + not_selected)

    keep = ~duplicate & ~contaminated
    names = [part_file(stems[s], p) for s, p in zip(shard[keep], part[keep], strict=True)]
    columns = {"file": pa.array(names, pa.string()), "row": row[keep], "uid": uid[keep]}
    write_table(folder / "index.parquet", pa.table({**columns, "num_tokens": num_tokens[keep], "held_out": held_out[keep]}))
    train_tokens = num_tokens[keep & ~held_out].astype(np.int64)
    prompt_set = PromptSet(
        folder=str(folder),
        num_train=len(train_tokens),
        num_held_out=int((keep & held_out).sum()),
        num_rejected=len(rejected),
        num_contaminated=len(left_out),
        num_truncated=sum(result.num_truncated for result in results),
        num_tokens=int(train_tokens.sum()),
        mean_prompt_tokens=float(train_tokens.mean()) if len(train_tokens) else 0.0,
        max_prompt_tokens=int(train_tokens.max(initial=0)),
        num_not_selected=len(not_selected),
        fingerprint=hashlib.blake2b(np.sort(uid[keep]).tobytes(), digest_size=16).hexdigest(),
    )
    _check(prompt_set, num_rows, rejected, config)
    return prompt_set


def _check(prompt_set: PromptSet, num_rows: int, rejected: list[Reject], config: Config) -> None:
    """Say what was found, and refuse it where too much of it is unusable."""
    limit = config.data.max_rejected_fraction
    reasons = "".join(f"\n  {file}:{line}: {reason}" for file, line, reason in rejected[:3])
    where = f"all are in {Path(prompt_set.folder).parent / REJECTED_FILE}, the first:{reasons}"
    if len(rejected) > limit * num_rows:
        raise DataError(
            f"{len(rejected)} of {num_rows} rows are unusable, more than data.max_rejected_fraction={limit} allows; "
            f"mend them or raise the limit; {where}"
        )
    if not prompt_set.num_train:
        raise DataError(
            f"data.prompts={config.data.prompts} has no prompt to train on: {num_rows} rows with the held-out ones, "
            f"{len(rejected)} unusable, {prompt_set.num_contaminated} also held out, "
            f"{prompt_set.num_not_selected} not of this stage"
        )
    logger.info(
        "prompts: %d to train on (%.0f tokens each, at most %d), %d held out, %d truncated, %d rejected, %d also held out, "
        "%d not of this stage",
        prompt_set.num_train,
        prompt_set.mean_prompt_tokens,
        prompt_set.max_prompt_tokens,
        prompt_set.num_held_out,
        prompt_set.num_truncated,
        prompt_set.num_rejected,
        prompt_set.num_contaminated,
        prompt_set.num_not_selected,
    )


def _teachers(config: Config) -> dict[str, Any]:
    """Of several teachers: who they are, and what decides between them."""
    if not isinstance(config.teacher, SeveralTeachersConfig):
        return {}
    return {"teachers": tuple(sorted(config.teacher.weights.items())), "teacher_seed": config.teacher.sampling.seed}


def _max_tokens(config: Config) -> int:
    """Longest sequence to send to the teacher, in tokens. Raises DataError where completions leave no room for a prompt."""
    context = describe(config.teacher).max_model_len
    if config.data.completions == "recorded":
        return context - 1  # an engine that scores a text also takes one step after it
    completion = config.teacher.sampling.max_tokens
    if completion >= context:
        raise DataError(
            f"teacher.sampling.max_tokens={completion} fills the teacher's whole context of {context} tokens; "
            "lower it, or raise teacher.max_model_len"
        )
    return context - completion


def _fingerprint(rules: RowRules, train: list[SourceFile], held_out: list[SourceFile], limit: float) -> str:
    files = [
        [str(file.path), file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns] for file in train + held_out
    ]
    tokenizer = tokenizer_fingerprint(Path(rules.tokenizer))
    parts = [FORMAT_VERSION, asdict(rules), tokenizer, files, len(train), limit]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _load(folder: Path, fingerprint: str) -> PromptSet | None:
    path = folder / "prompt_set.json"
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    if saved["fingerprint"] != fingerprint:
        return None
    return PromptSet(**{**saved["prompt_set"], "folder": str(folder)})


def _write_rejected(path: Path, rejected: list[Reject]) -> None:
    lines = [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejected]
    _write_text(path, "".join(lines))


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=1))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)
