"""An epoch of offline data as a Ray dataset: what `stream.py` is for prompts, without a teacher.

In:  data.offline (files and weights), without prompts data.held_out; the epoch; the uids that were trained already.
Out: a ray.data.Dataset of EXAMPLE_SCHEMA blocks, held-out rows first; rows with a held-out prompt are not among the others.

The files are indexed once per run, in Ray tasks, and read where they are; the driver handles descriptors only.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from raykd.config import Config
from raykd.data.curriculum import Curriculum
from raykd.data.dataset import OfflineIndex, epoch_order, join_indexes
from raykd.data.examples import Wanted, examples_to_table
from raykd.data.held_out import held_out_hashes, leave_out, prompt_hashes
from raykd.data.offline_files import FileIndex, Kind, index_file, read_examples
from raykd.data.offline_rows import RowReader
from raykd.data.pairs import numbered
from raykd.data.prompt_rows import Reject, load_tokenizer, write_table
from raykd.data.readers import DataError
from raykd.data.sources import REJECTED_FILE, PromptSet, RowCounts
from raykd.data.stream import Rejects, planned_steps, set_data_context
from raykd.data.uids import epoch_uid
from raykd.types import EXAMPLE_SCHEMA, Example
from raykd.vocabulary import backend_of, compare_vocabularies, remap_ids, student_tokenizer
from teacher_serving.identity import describe, read_text_config, vocabulary_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BLOCK_ROWS = 32
"""Rows of a block, and of a task of the reader."""
BESIDE_PROMPTS = 2**40
"""Pass that gives rows beside prompts their uids: a file may hold the answers to these very prompts, under their uids."""
HASH_ROWS = 20_000
"""Rows whose prompts a task hashes: seconds of work, as its process takes to load a tokenizer."""
_NO_STATES = np.empty((0, 0, 0), np.float16)


@dataclass(frozen=True)
class OfflineSet:
    """Indexed offline files of a run, held-out ones first. `num_train` counts an epoch: weights are applied."""

    folder: str
    num_train: int
    num_held_out: int
    num_rejected: int
    num_rows: int  # usable ones of all files
    fingerprint: str  # of what the files hold and their weights
    num_contaminated: int = 0  # rows left out of training because a held-out row has the same prompt

    @property
    def counts(self) -> RowCounts:
        num_rows = self.num_rows + self.num_rejected + self.num_contaminated
        return RowCounts(self.num_train, num_rows, self.num_rejected)

    def index(self) -> tuple[OfflineIndex, np.ndarray]:
        """The index, and which of its files are held out (bool [files])."""
        files = json.loads((Path(self.folder) / "files.json").read_text())
        rows = pq.read_table(Path(self.folder) / "index.parquet")
        file = rows["file"].to_numpy()
        indexes = []
        for number, entry in enumerate(files):
            own = rows.filter(pa.array(file == number))
            position, line, uid = (own[name].to_numpy() for name in ("position", "line", "uid"))
            header = {"vocabulary_fingerprint": entry["vocabulary"]}
            facts = (entry["path"], entry["kind"], position, line, uid, [], entry["fingerprint"], header)
            indexes.append(FileIndex(*facts))
        index = join_indexes(indexes, [entry["weight"] for entry in files])
        return index, np.array([entry["held_out"] for entry in files])


def offline_files(config: Config) -> list[tuple[str, float, bool]]:
    """Path, weight and whether it is held out, of the offline files of a run. Raises DataError where one is not there."""
    data = config.data
    held_out = [(data.held_out, 1.0, True)] if data.held_out and not data.prompts else []
    files = held_out + [(file.path, file.weight, False) for file in data.offline]
    for path, _, is_held_out in files:
        if not Path(path).is_file():
            option = "data.held_out (without data.prompts)" if is_held_out else "data.offline"
            raise DataError(f"{option}: no file {path!r}; expected a JSONL or Parquet file")
    return [(str(Path(path).resolve()), weight, is_held_out) for path, weight, is_held_out in files]


def prepare_offline(config: Config, run_folder: str | Path, prompts: PromptSet | None = None) -> OfflineSet:
    """Index the offline files of a run, or find them indexed. Needs a Ray cluster.

    Rows whose prompt is held out as well are left out of training; `prompts`: those of the run, where it has any. Raises
    DataError where a file cannot be read, where too large a share of rows is unusable, where none is left to train on, and
    where the files are not those that this run began with.
    """
    folder = Path(run_folder) / "offline"
    files = offline_files(config)
    num_held_out = sum(is_held_out for _, _, is_held_out in files)
    state = folder / "offline_set.json"
    held_out = prompts if prompts is not None and prompts.num_held_out else None
    stats: list[Any] = [[path, weight, *_stat(path)] for path, weight, _ in files]
    stats.append(held_out.fingerprint if held_out else "")
    saved = json.loads(state.read_text()) if state.is_file() else None
    if saved is not None and saved["stats"] == stats:
        return OfflineSet(**saved["offline_set"] | {"folder": str(folder)})
    indexes, left_out = _index_files([path for path, _, _ in files], config, num_held_out, held_out)
    index = join_indexes(indexes, [weight for _, weight, _ in files])
    if saved is not None and saved["offline_set"]["fingerprint"] != index.fingerprint:
        raise DataError(
            f"data.offline holds other rows than when this run began (fingerprint {index.fingerprint}, then "
            f"{saved['offline_set']['fingerprint']}): bring the files back, or start another run.name"
        )
    training = _training(index, num_held_out)
    if not len(training.uid) and left_out:
        raise DataError(
            f"data.offline has no row to train on: {len(left_out)} have a prompt that is held out as well, "
            f"{len(index.rejected)} are unusable"
        )
    index.check(config.data.max_rejected_fraction)
    folder.mkdir(parents=True, exist_ok=True)
    if saved is None:  # else they are there
        rejects = [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in index.rejected + left_out]
        with open(folder.parent / REJECTED_FILE, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(rejects))
    _write_index(folder, index, [is_held_out for _, _, is_held_out in files])
    offline_set = OfflineSet(
        folder=str(folder),
        num_train=len(epoch_order(training, 0, 0)[0]),
        num_held_out=int((index.file < num_held_out).sum()),
        num_rejected=len(index.rejected),
        num_rows=len(index.uid),
        fingerprint=index.fingerprint,
        num_contaminated=len(left_out),
    )
    if not offline_set.num_train:
        raise DataError("data.offline has no row to train on: all are unusable, or repeat held-out ones")
    logger.info(
        "offline rows: %d to train on in an epoch, %d held out, %d rejected, %d also held out",
        offline_set.num_train, offline_set.num_held_out, offline_set.num_rejected, offline_set.num_contaminated,
    )  # fmt: skip
    _write_text(state, json.dumps({"stats": stats, "offline_set": asdict(offline_set)}, indent=1))
    return offline_set


def offline_dataset(
    config: Config,
    offline_set: OfflineSet,
    epoch: int,
    consumed_uids: np.ndarray,
    beside: RowCounts = RowCounts(),  # noqa: B008 (frozen)
) -> Dataset:
    """The examples of an epoch that are still to be trained, held-out ones first. Lazy: nothing runs before it is read.

    `consumed_uids`: int64, uids of this run's ledger (of any epoch, in any order). `beside`: the prompts that the rows are
    mixed with.
    """
    set_data_context(config)
    plan = plan_offline_epoch(config, offline_set, epoch, consumed_uids, beside)
    if not plan.num_rows:
        return ray.data.from_blocks([EXAMPLE_SCHEMA.empty_table()])
    blocks = [plan.slice(start, BLOCK_ROWS).combine_chunks() for start in range(0, plan.num_rows, BLOCK_ROWS)]
    return ray.data.from_blocks(blocks).map_batches(
        OfflineReader,
        fn_constructor_kwargs={
            "config": config,
            "rejects": Rejects.of(offline_set.folder, offline_set.counts + beside, config),
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.data.num_extractors),
        num_cpus=config.data.extractor_cpus,
    )


def plan_offline_epoch(
    config: Config,
    offline_set: OfflineSet,
    epoch: int,
    consumed_uids: np.ndarray,
    beside: RowCounts = RowCounts(),  # noqa: B008 (frozen)
) -> pa.Table:
    """Descriptors (file, kind, vocabulary, position, key, uid, epoch_uid, step, held_out): held-out rows first, then the
    epoch's order.

    Without what is consumed; empty if nothing is left. The order depends on files, weights, run.seed and epoch alone. The
    step is as in DESCRIPTOR_SCHEMA.
    """
    index, held_out = offline_set.index()
    if config.data.prompts:
        index = replace(index, uid=epoch_uid(index.uid, BESIDE_PROMPTS))
    num_held_out = int(held_out.sum())
    rows, uids = epoch_order(_training(index, num_held_out), config.run.seed, epoch, shuffle=config.data.shuffle)
    step = planned_steps(len(rows), len(rows) + beside.num_train, epoch, config.train.sequences_per_step)
    left = ~np.isin(uids, consumed_uids)
    first = int((index.file < num_held_out).sum())  # training rows stand behind the held-out ones
    rows, uids, step = rows[left] + first, uids[left], step[left]
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
            "vocabulary": pa.array([file.vocabulary for file in files], pa.string()),
            "position": pa.array([int(file.position[i]) for file, i in zip(files, place, strict=True)], pa.int64()),
            "key": keys,
            "uid": index.uid[rows],
            "epoch_uid": np.concatenate([index.uid[validation], uids]),
            "step": np.concatenate([np.full(len(validation), -1), step]),
            "held_out": np.arange(len(rows)) < len(validation),
        }
    )


class OfflineReader:
    """The only stage: descriptors to examples in the student's ids. Books rows that gave none."""

    def __init__(self, config: Config, rejects: Rejects) -> None:
        teacher = load_tokenizer(config.teacher.tokenizer_folder)
        student = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
        self._match = compare_vocabularies(teacher, student).require()
        self._curriculum = Curriculum.of(config, student)
        self._num_layers = len(config.teacher.hidden_layers)
        folder = Path(config.teacher.tokenizer_folder)
        self._hidden_size = read_text_config(folder)["hidden_size"] if self._num_layers else 0
        max_tokens = describe(config.teacher).max_model_len
        pairs = "code_mode_preference" in config.loss.weights

        def reader(tokenizer: PreTrainedTokenizerBase) -> RowReader:
            return RowReader(tokenizer, config.teacher.top_k, max_tokens, Wanted.by(config, tokenizer), pairs)

        self._teachers = reader(teacher)
        self._students = {} if self._match.kind == "identical" else {_fingerprint(student): reader(student)}
        self._rejects = rejects

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A block of EXAMPLE_SCHEMA."""
        rows = rows.combine_chunks()
        paths = np.array(rows["file"].to_pylist(), object)
        positions = rows["position"].to_numpy()
        kinds, uids, held_out = (rows[name].to_pylist() for name in ("kind", "epoch_uid", "held_out"))
        vocabularies = rows["vocabulary"].to_pylist()
        results: dict[int, tuple[Example, ...] | str] = {}
        for path in dict.fromkeys(paths):
            own = np.flatnonzero(paths == path)
            reader = self._students.get(vocabularies[own[0]], self._teachers)
            results |= dict(zip(own.tolist(), read_examples(path, kinds[own[0]], positions[own], reader), strict=True))
        results = {i: result if isinstance(result, str) else self._with_states(result) for i, result in results.items()}
        found = [(i, result) for i, result in sorted(results.items()) if not isinstance(result, str)]
        examples = [example for i, made in found for example in numbered(made, uids[i], held_out=held_out[i])]
        problems = {i: result for i, result in results.items() if isinstance(result, str)}
        refused = rows["uid"].take(pa.array(list(problems), pa.int64())).to_pylist()
        self._rejects.add(rows, refused, list(problems.values()))
        in_student_ids = np.array([vocabularies[i] in self._students for i, made in found for _ in made], bool)
        table = self._carried_over(examples_to_table(examples), in_student_ids)
        if self._curriculum is None:
            return table
        step = rows["step"].to_pylist()
        return self._curriculum.apply(table, [step[i] for i, made in found for _ in made])

    def _carried_over(self, table: pa.Table, in_student_ids: np.ndarray) -> pa.Table:
        """The rows in order, those in the teacher's ids carried over to the student's."""
        if self._match.kind == "identical":
            return table
        order = np.argsort(in_student_ids, kind="stable")  # the teacher's first
        ordered = table.take(pa.array(order))
        num_teachers = int((~in_student_ids).sum())
        parts = [remap_ids(ordered.slice(0, num_teachers).combine_chunks(), self._match), ordered.slice(num_teachers)]
        return pa.concat_tables(parts).take(pa.array(np.argsort(order))).combine_chunks()

    def _with_states(self, examples: tuple[Example, ...]) -> tuple[Example, ...] | str:
        """The examples of a row, with teacher states if the run has any; or why those of the row are of no use to it."""
        if not self._num_layers:
            return tuple(replace(example, teacher_hidden=_NO_STATES) for example in examples)
        wrong = [e.teacher_hidden.shape for e in examples if e.num_teacher_layers and not self._are_states(e)]
        if not wrong:
            return examples
        return (
            f"its teacher states are of {wrong[0][0]} layers of width {wrong[0][2]}, expected {self._num_layers} layers "
            f"(teacher.hidden_layers) of width {self._hidden_size}; write them anew, or leave them out"
        )

    def _are_states(self, example: Example) -> bool:
        return (len(example.teacher_hidden), example.teacher_hidden.shape[2]) == (self._num_layers, self._hidden_size)


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


def _index_files(
    paths: Sequence[str], config: Config, num_held_out: int, prompts: PromptSet | None
) -> tuple[list[FileIndex], list[Reject]]:
    """The files, the first of which are held out, without training rows with a held-out prompt; and those rows.

    `prompts`: those of the run, if some are held out.
    """
    student = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
    vocabularies = vocabulary_fingerprint(config.teacher.tokenizer_folder), _fingerprint(student)
    of_prompts = [] if prompts is None else [_task(held_out_hashes).remote(prompts, config.teacher.tokenizer_folder)]
    files = _results([_task(index_file).remote(path, *vocabularies) for path in paths])
    if not num_held_out and not of_prompts:
        return files, []
    hashes = _hash_files(files, vocabularies, config)
    held_out = np.concatenate([*_results(of_prompts), *hashes[:num_held_out]])
    kept, left_out = leave_out(files[num_held_out:], hashes[num_held_out:], held_out)
    return [*files[:num_held_out], *kept], left_out


def _hash_files(files: Sequence[FileIndex], vocabularies: tuple[str, str], config: Config) -> list[np.ndarray]:
    """For every file the hashes of its rows' prompts, in order. `vocabularies`: of teacher and student."""
    teachers, students = vocabularies
    parts = []
    for index in files:
        ranges = [index.position[start : start + HASH_ROWS] for start in range(0, len(index.position), HASH_ROWS)]
        facts = config, index.vocabulary == students != teachers
        parts.append([_task(_hash_rows).remote(index.path, index.kind, rows, *facts) for rows in ranges])
    return [np.concatenate([np.empty(0, np.int64), *_results(of_file)]) for of_file in parts]


def _hash_rows(path: str, kind: Kind, positions: np.ndarray, config: Config, in_student_ids: bool) -> np.ndarray:
    if not in_student_ids:
        return prompt_hashes(path, kind, positions, load_tokenizer(config.teacher.tokenizer_folder))
    student = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
    return prompt_hashes(path, kind, positions, student)


def _task(function: Callable[..., Any]) -> Any:
    return ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="DEFAULT")(function)  # see sources.py


def _results(tasks: Sequence[Any]) -> list[Any]:
    try:
        return ray.get(list(tasks))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DataError) else error) from None


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    return vocabulary_fingerprint(backend_of(tokenizer))


def _stat(path: str) -> tuple[int, int]:
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def _write_index(folder: Path, index: OfflineIndex, held_out: Sequence[bool]) -> None:
    facts = zip(index.files, index.weights, held_out, strict=True)
    files = [
        {
            "path": f.path,
            "kind": f.kind,
            "vocabulary": f.vocabulary,
            "fingerprint": f.fingerprint,
            "weight": weight,
            "held_out": held,
        }
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
