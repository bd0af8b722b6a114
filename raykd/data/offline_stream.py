"""An epoch of offline data as a Ray dataset: what `stream.py` is for prompts, without a teacher.

In:  data.offline (files and weights), data.held_out; the epoch; the uids that were trained already.
Out: a ray.data.Dataset of EXAMPLE_SCHEMA blocks, held-out rows first.

The files are indexed once per run, in Ray tasks, and read where they are; the driver handles descriptors only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from raykd.config import Config
from raykd.data.dataset import OfflineIndex, epoch_order, join_indexes
from raykd.data.examples import Wanted, build_examples, examples_to_table
from raykd.data.offline_files import FileIndex, index_file, read_examples
from raykd.data.offline_rows import RowReader
from raykd.data.prompt_rows import load_tokenizer, write_table
from raykd.data.readers import DataError
from raykd.data.sources import REJECTED_FILE
from raykd.data.stream import Rejects, set_data_context
from raykd.types import EXAMPLE_SCHEMA, Example
from teacher_serving.identity import describe, vocabulary_fingerprint

BLOCK_ROWS = 32
"""Rows of a block, and of a task of the reader."""


@dataclass(frozen=True)
class OfflineSet:
    """Indexed offline files of a run, held-out ones first. `num_train` counts an epoch: weights are applied."""

    folder: str
    num_train: int
    num_held_out: int
    num_rejected: int
    num_rows: int  # usable ones of all files
    fingerprint: str  # of what the files hold and their weights

    def index(self) -> tuple[OfflineIndex, np.ndarray]:
        """The index, and which of its files are held out (bool [files])."""
        files = json.loads((Path(self.folder) / "files.json").read_text())
        rows = pq.read_table(Path(self.folder) / "index.parquet")
        file = rows["file"].to_numpy()
        indexes = []
        for number, entry in enumerate(files):
            own = rows.filter(pa.array(file == number))
            position, line, uid = (own[name].to_numpy() for name in ("position", "line", "uid"))
            facts = (entry["path"], entry["kind"], position, line, uid, [], entry["fingerprint"], {})
            indexes.append(FileIndex(*facts))
        index = join_indexes(indexes, [entry["weight"] for entry in files])
        return index, np.array([entry["held_out"] for entry in files])


def prepare_offline(config: Config, run_folder: str | Path) -> OfflineSet:
    """Index the offline files of a run, or find them indexed. Needs a Ray cluster.

    Raises DataError where a file cannot be read, where too large a share of rows is unusable, and where the files are not
    those that this run began with.
    """
    folder = Path(run_folder) / "offline"
    held_out = [(config.data.held_out, 1.0, True)] if config.data.held_out else []
    wanted = held_out + [(file.path, file.weight, False) for file in config.data.offline]
    state = folder / "offline_set.json"
    stats = [[str(Path(path).resolve()), weight, *_stat(path)] for path, weight, _ in wanted]
    saved = json.loads(state.read_text()) if state.is_file() else None
    if saved is not None and saved["stats"] == stats:
        return OfflineSet(**saved["offline_set"] | {"folder": str(folder)})
    index = join_indexes(
        _index_files([str(Path(path).resolve()) for path, _, _ in wanted], config), [w for _, w, _ in wanted]
    )
    if saved is not None and saved["offline_set"]["fingerprint"] != index.fingerprint:
        raise DataError(
            f"data.offline holds other rows than when this run began (fingerprint {index.fingerprint}, then "
            f"{saved['offline_set']['fingerprint']}): bring the files back, or start another run.name"
        )
    index.check(config.data.max_rejected_fraction)
    folder.mkdir(parents=True, exist_ok=True)
    rejects = [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in index.rejected]
    _write_text(folder.parent / REJECTED_FILE, "".join(rejects))
    _write_index(folder, index, [is_held_out for _, _, is_held_out in wanted])
    offline_set = OfflineSet(
        folder=str(folder),
        num_train=len(epoch_order(_training(index, len(held_out)), 0, 0)[0]),
        num_held_out=int((index.file < len(held_out)).sum()),
        num_rejected=len(index.rejected),
        num_rows=len(index.uid),
        fingerprint=index.fingerprint,
    )
    if not offline_set.num_train:
        raise DataError("data.offline has no row to train on: all are held out as well, or unusable")
    _write_text(state, json.dumps({"stats": stats, "offline_set": asdict(offline_set)}, indent=1))
    return offline_set


def offline_dataset(config: Config, offline_set: OfflineSet, epoch: int, consumed_uids: np.ndarray) -> Dataset:
    """The examples of an epoch that are still to be trained, held-out ones first. Lazy: nothing runs before it is read.

    `consumed_uids`: int64, uids of this run's ledger (of any epoch, in any order).
    """
    set_data_context(config)
    plan = plan_offline_epoch(config, offline_set, epoch, consumed_uids)
    if not plan.num_rows:
        return ray.data.from_arrow(EXAMPLE_SCHEMA.empty_table())
    blocks = [plan.slice(start, BLOCK_ROWS).combine_chunks() for start in range(0, plan.num_rows, BLOCK_ROWS)]
    rejects = Rejects(
        str(Path(offline_set.folder).parent / REJECTED_FILE),
        offline_set.num_rows + offline_set.num_rejected,
        offline_set.num_rejected,
        config.data.max_rejected_fraction,
    )
    return ray.data.from_arrow(blocks).map_batches(
        OfflineReader,
        fn_constructor_kwargs={"config": config, "rejects": rejects},
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.data.num_extractors),
        num_cpus=config.data.extractor_cpus,
    )


def plan_offline_epoch(config: Config, offline_set: OfflineSet, epoch: int, consumed_uids: np.ndarray) -> pa.Table:
    """Descriptors (file, kind, position, key, uid, epoch_uid, held_out): held-out rows first, then the epoch's order.

    Without what is consumed; empty if nothing is left. The order depends on files, weights, run.seed and epoch alone.
    """
    index, held_out = offline_set.index()
    num_held_out = int(held_out.sum())
    rows, uids = epoch_order(_training(index, num_held_out), config.run.seed, epoch, shuffle=config.data.shuffle)
    left = ~np.isin(uids, consumed_uids)
    first = int((index.file < num_held_out).sum())  # training rows stand behind the held-out ones
    rows, uids = rows[left] + first, uids[left]
    if not len(rows):
        return pa.table({"epoch_uid": pa.array([], pa.int64())})
    validation = np.arange(min(first, config.data.max_held_out))
    rows = np.concatenate([validation, rows])
    files = [index.files[number] for number in index.file[rows]]
    place = index.row[rows]
    keys = [f"{file.path}:{file.line[i]}" for file, i in zip(files, place, strict=True)]
    return pa.table(
        {
            "file": pa.array([file.path for file in files]),
            "kind": pa.array([file.kind for file in files]),
            "position": pa.array([int(file.position[i]) for file, i in zip(files, place, strict=True)], pa.int64()),
            "key": keys,
            "uid": index.uid[rows],
            "epoch_uid": np.concatenate([index.uid[validation], uids]),
            "held_out": np.arange(len(rows)) < len(validation),
        }
    )


class OfflineReader:
    """The only stage: descriptors to examples. Books rows that gave none."""

    def __init__(self, config: Config, rejects: Rejects) -> None:
        tokenizer = load_tokenizer(config.teacher.model)
        build = partial(build_examples, wanted=Wanted.by(config, tokenizer))
        max_tokens = describe(config.teacher).max_model_len
        self._reader = RowReader(tokenizer, config.teacher.top_k, max_tokens, build, config.halt)
        self._rejects = rejects

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A block of EXAMPLE_SCHEMA."""
        rows = rows.combine_chunks()
        paths = np.array(rows["file"].to_pylist(), object)
        positions = rows["position"].to_numpy()
        kinds, uids, held_out = (rows[name].to_pylist() for name in ("kind", "epoch_uid", "held_out"))
        results: dict[int, Example | str] = {}
        for path in dict.fromkeys(paths):
            own = np.flatnonzero(paths == path)
            results |= dict(zip(own.tolist(), read_examples(path, kinds[own[0]], positions[own], self._reader), strict=True))
        found = [(i, result) for i, result in results.items() if isinstance(result, Example)]
        examples = [replace(e, uid=uids[i], held_out=held_out[i] or e.held_out) for i, e in sorted(found, key=_place)]
        problems = {i: result for i, result in results.items() if isinstance(result, str)}
        refused = rows["uid"].take(pa.array(list(problems), pa.int64())).to_pylist()
        self._rejects.add(rows, refused, list(problems.values()))
        return examples_to_table(examples)


def _place(entry: tuple[int, Any]) -> int:
    return entry[0]


def _training(index: OfflineIndex, num_held_out: int) -> OfflineIndex:
    """The index without its first, held-out files."""
    rows = index.file >= num_held_out
    return OfflineIndex(
        index.files[num_held_out:],
        index.weights[num_held_out:],
        index.file[rows] - num_held_out,
        index.row[rows],
        index.uid[rows],
        [],
    )


def _index_files(paths: Sequence[str], config: Config) -> list[FileIndex]:
    fingerprint = vocabulary_fingerprint(config.teacher.model)
    task = ray.remote(num_cpus=1, max_retries=3)(_index_file)
    try:
        return ray.get([task.remote(path, fingerprint) for path in paths])
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DataError) else error) from None


def _index_file(path: str, fingerprint: str) -> FileIndex:
    return index_file(path, fingerprint)


def _stat(path: str) -> tuple[int, int]:
    if not Path(path).is_file():
        raise DataError(f"data.offline: no file {path!r}; expected a JSONL or Parquet file")
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def _write_index(folder: Path, index: OfflineIndex, held_out: Sequence[bool]) -> None:
    facts = zip(index.files, index.weights, held_out, strict=True)
    files = [
        {"path": f.path, "kind": f.kind, "fingerprint": f.fingerprint, "weight": weight, "held_out": held}
        for f, weight, held in facts
    ]
    _write_text(folder / "files.json", json.dumps(files, indent=1))
    columns = [(index.files[number], index.file == number) for number in range(len(index.files))]
    position, line = (
        np.concatenate([getattr(f, name)[index.row[own]] for f, own in columns]) for name in ("position", "line")
    )
    table = pa.table({"file": index.file, "position": position, "line": line, "uid": index.uid})
    write_table(folder / "index.parquet", table)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)
