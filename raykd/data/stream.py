"""The stream of one epoch: prompts -> teacher -> examples, as a Ray dataset that the train workers read block by block.

In:  the prepared prompts, the epoch, the uids that were trained already.
Out: a ray.data.Dataset of EXAMPLE_SCHEMA blocks, held-out rows first.

The driver handles descriptors only (which rows of which files); prompts, scores and examples go from actor to actor
through the object store. What the teacher answered is kept (cache.py); rows found there are read instead of asked for,
and with all of them there the plan has no teacher. The teacher's lead over the trainer is bounded (lead.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)

from raykd.config import Config, LengthStage
from raykd.data.cache import CacheIndex, TeacherCache
from raykd.data.curriculum import Curriculum
from raykd.data.examples import Wanted, build_examples
from raykd.data.lead import LEAD_KEY, RUN_KEY, TOKEN_KEY, LeadPolicy
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.readers import DataError
from raykd.data.sources import MISTAKE_FILE, REJECTED_FILE, PromptSet, RowCounts, read_prompt_rows
from raykd.data.uids import epoch_uid
from raykd.ray_metrics import RayMetrics
from raykd.types import EXAMPLE_SCHEMA
from raykd.vocabulary import compare_vocabularies, remap_ids, student_tokenizer
from teacher_serving.actor import TIME_SCHEMA, take_keys, teacher_stage
from teacher_serving.config import HttpTeacherConfig, SeveralTeachersConfig
from teacher_serving.identity import describe, state_bytes_per_token
from teacher_serving.types import NOT_ASKED, TEACHER_OUTPUT_SCHEMA

Stage = Callable[[Dataset], Dataset]

SHUFFLE_WINDOW = 4
"""Part files whose rows are mixed: more mix better and make every block open more files."""
LEDGER_FILE = "spent.txt"

DESCRIPTOR_SCHEMA = pa.schema(
    [
        ("uid", pa.int64()),
        ("epoch_uid", pa.int64()),
        ("step", pa.int32()),  # optimizer step that the row is for, were all of them equal; -1: held out
        ("file", pa.string()),
        ("row", pa.int32()),
        ("cache_file", pa.string()),  # null: the teacher must be asked
        ("cache_row", pa.int32()),
    ]
)
"""What passes through the driver: about 100 bytes a prompt, whatever the prompt's length."""


def build_dataset(
    config: Config,
    prompt_set: PromptSet,
    epoch: int,
    consumed_uids: np.ndarray,
    environment: Mapping[str, str] | None = None,
    beside: RowCounts = RowCounts(),  # noqa: B008 (frozen)
) -> Dataset:
    """The examples of an epoch that are still to be trained, held-out ones first. Lazy: nothing runs before it is read.

    `consumed_uids`: int64, uids of this run's ledger (of any epoch, in any order). `environment`: see `teacher_stage`.
    `beside`: the offline rows that the prompts are mixed with.
    """
    take_keys(config.teacher, environment or {})  # Ray Train makes its datasets in a process that has none
    return example_stream(config, prompt_set, epoch, consumed_uids, asked(config, prompt_set, environment), beside)


def asked(config: Config, prompt_set: PromptSet, environment: Mapping[str, str] | None = None) -> Stage:
    """The stage of the config's teacher. What one with a budget costs is kept with its answers."""
    has_budget = isinstance(config.teacher, HttpTeacherConfig | SeveralTeachersConfig)
    ledger = teacher_cache(config, prompt_set).path / LEDGER_FILE if has_budget else None
    return partial(teacher_stage, config=config.teacher, environment=environment, ledger=ledger)


def example_stream(
    config: Config,
    prompt_set: PromptSet,
    epoch: int,
    consumed_uids: np.ndarray,
    teacher: Stage,
    beside: RowCounts = RowCounts(),  # noqa: B008 (frozen)
) -> Dataset:
    """`build_dataset` with the stage that answers the rows given: the place where a test puts its own."""
    set_data_context(config)
    cache = teacher_cache(config, prompt_set)
    rejects = Rejects.of(prompt_set.folder, prompt_set.counts + beside, config)
    plan = plan_epoch(config, prompt_set, epoch, consumed_uids, cache.index(), beside)
    if epoch > 0:  # a row that had no answer when the teacher was there is no reason to start it again
        plan = plan.filter(pa.array(~np.isin(plan["uid"].to_numpy(), rejects.uids())))
    if not plan.num_rows:
        return ray.data.from_blocks([EXAMPLE_SCHEMA.empty_table()])
    return answered_stream(config, prompt_set, plan, cache, teacher).map_batches(
        Extractor,
        fn_constructor_kwargs={
            "config": config,
            "cache": cache,
            "rejects": rejects,
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.data.num_extractors),
        num_cpus=config.data.extractor_cpus,
    )


def answered_stream(config: Config, prompt_set: PromptSet, plan: pa.Table, cache: TeacherCache, teacher: Stage) -> Dataset:
    """The planned rows with the teacher's columns, in blocks of `teacher.batch_size` rows.

    What the cache has is read, the rest asked for; there is no teacher where the cache has all.
    """
    size = config.teacher.batch_size
    blocks = [plan.slice(start, size).combine_chunks() for start in range(0, plan.num_rows, size)]
    # Not from_arrow, which has a task look at each block: where train workers hold the last CPU it would wait for them.
    descriptors, number = ray.data.from_blocks(blocks), config.data.num_extractors
    if not plan["cache_file"].null_count:  # tasks, which Ray Data fuses with the extractors behind them
        return descriptors.map_batches(
            Prompts(prompt_set.folder, cache),
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=number),
            num_cpus=config.data.extractor_cpus,
        )
    # Actors: where a node has more processes than CPUs, Ray ends that of a task a second later, and the teacher takes its
    # time before it asks for the next rows, for which a process would be started anew: two seconds of CPU.
    prompts = descriptors.map_batches(
        Prompts,
        fn_constructor_args=(prompt_set.folder, cache),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=number),
        num_cpus=0,
    )
    return teacher(prompts)


def teacher_cache(config: Config, prompt_set: PromptSet) -> TeacherCache:
    """Where this run keeps and finds its teacher's output."""
    folder = config.data.teacher_cache or str(Path(prompt_set.folder).parent / "teacher_cache")
    return TeacherCache(folder, describe(config.teacher).fingerprint)


def set_data_context(config: Config) -> None:
    """Every setting of Ray Data that raykd changes, in the DataContext of this process."""
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # a trainer may be busy, and a teacher may load, for hours
    context.max_consecutive_actor_init_deaths = 3  # 0 would fail the run with the first engine that dies while starting
    context.enable_fallback_to_arrow_object_ext_type = False  # a column Arrow cannot type is an error, not a pickle
    context.raise_original_map_exception = True  # else a DataError arrives as one of Ray's, without its cause
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.execution_options.preserve_order = config.data.fixed_order
    token_bytes = bytes_per_token(config.teacher.top_k, state_bytes_per_token(config.teacher))
    context.set_config(LEAD_KEY, config.data.max_lead_tokens * token_bytes)
    context.set_config(TOKEN_KEY, token_bytes)
    context.set_config(RUN_KEY, (config.run.name, config.stage))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, LeadPolicy])


def bytes_per_token(top_k: int, state_bytes: int = 0) -> int:
    """Bytes of one completion token of an example: K ids and log-probabilities, tail, id, marks, hidden states."""
    return 6 * top_k + 10 + state_bytes


def planned_steps(num_rows: int, num_mixed: int, epoch: int, per_step: int) -> np.ndarray:
    """The optimizer step (int64 [num_rows], from 0) that each row of a set is for, were all steps and workers equal.

    `num_mixed` rows of all sets make an epoch, `per_step` of them a step; those of one set stand evenly among them.
    """
    place = np.arange(num_rows) * num_mixed // max(num_rows, 1)
    return epoch * -(-num_mixed // per_step) + place // per_step


def short_first(num_tokens: np.ndarray, step: np.ndarray, stages: Sequence[LengthStage]) -> np.ndarray:
    """Order int64 [R] of an epoch's rows, such that while a stage lasts only rows short enough for it come.

    Args:
        num_tokens: [R] of each row's prompt, in the order drawn, which rows of one stage keep.
        step: [R], rising: the optimizer step (from 0) of each place in the order.
    """
    left, order = np.arange(len(num_tokens)), []
    for stage in stages:
        num_places = np.searchsorted(step, stage.until_step) - sum(map(len, order))
        fits = np.flatnonzero(num_tokens[left] <= stage.max_prompt_tokens)[: max(num_places, 0)]
        order.append(left[fits])
        left = np.delete(left, fits)
    return np.concatenate([*order, left])


def plan_epoch(
    config: Config,
    prompt_set: PromptSet,
    epoch: int,
    consumed_uids: np.ndarray,
    cached: CacheIndex,
    beside: RowCounts = RowCounts(),  # noqa: B008 (frozen)
) -> pa.Table:
    """DESCRIPTOR_SCHEMA: held-out rows first, then the epoch's order without what is consumed; empty if nothing is left.

    The order depends on the prompts, run.seed and epoch alone, so that it goes on unchanged after a restart.
    """
    index = prompt_set.index()
    uid, held_out = index["uid"].to_numpy(), index["held_out"].to_numpy(zero_copy_only=False)
    validation = np.flatnonzero(held_out)[: config.data.max_held_out]
    train = np.flatnonzero(~held_out)
    if config.data.shuffle:
        parts = index["file"].combine_chunks().dictionary_encode()
        rng = np.random.default_rng([config.run.seed, epoch])
        place = rng.permutation(len(parts.dictionary))[parts.indices.to_numpy()]
        train = train[np.lexsort((rng.random(len(train)), place[train] // SHUFFLE_WINDOW))]
    step = planned_steps(len(train), len(train) + beside.num_train, epoch, config.train.sequences_per_step)
    train = train[short_first(index["num_tokens"].to_numpy()[train], step, config.data.length_stages)]
    left = ~np.isin(epoch_uid(uid[train], epoch), consumed_uids)
    train, step = train[left], step[left]
    if not len(train):
        return DESCRIPTOR_SCHEMA.empty_table()
    chosen = np.concatenate([validation, train])
    file, cache_row = cached.lookup(uid[chosen])
    names = np.array([*cached.files, None], object)  # -1, not found, is the last
    return pa.table(
        {
            "uid": uid[chosen],
            "epoch_uid": np.concatenate([uid[validation], epoch_uid(uid[train], epoch)]),
            "step": np.concatenate([np.full(len(validation), -1), step]),
            "file": index["file"].take(pa.array(chosen)),
            "row": index["row"].take(pa.array(chosen)),
            "cache_file": pa.array(names[file], pa.string()),
            "cache_row": cache_row,
        },
        schema=DESCRIPTOR_SCHEMA,
    )


@dataclass(frozen=True)
class Prompts:
    """Stage 1: descriptors to prompt rows, with the teacher's columns where the cache has them and null where not."""

    folder: str
    cache: TeacherCache

    def __call__(self, block: pa.Table) -> pa.Table:
        """PROMPT_ROW_SCHEMA, TEACHER_OUTPUT_SCHEMA (uid of epoch 0 in both), epoch_uid and cached (bool)."""
        prompts = read_prompt_rows(self.folder, block["file"].to_pylist(), block["row"].to_numpy())
        cached = block["cache_file"].is_valid().to_numpy()
        known = block.filter(pa.array(cached))
        answers = self.cache.read(known["cache_file"].to_pylist(), known["cache_row"].to_numpy())
        assert answers["uid"].equals(prompts["uid"].filter(pa.array(cached))), "the cache changed while it was in use"
        # The place of each cached row among the cached; the others are null, which `take` turns into null rows.
        answers = answers.take(pa.array(np.cumsum(cached) - 1, mask=~cached))
        for name in TEACHER_OUTPUT_SCHEMA.names:
            if name not in prompts.column_names:
                prompts = prompts.append_column(name, answers[name])
        for name in ("epoch_uid", "step"):
            prompts = prompts.append_column(name, block[name])
        return prompts.append_column("cached", pa.array(cached))


@dataclass(frozen=True)
class Rejects:
    """rejected.jsonl, as the actors of a run write it: rows that gave no example."""

    file: str
    num_rows: int  # of the user's files
    num_rejected: int  # of those, rejected before training began
    limit: float  # data.max_rejected_fraction
    run: str = ""
    stage: str = ""

    @staticmethod
    def of(folder: str, counts: RowCounts, config: Config) -> Rejects:
        """Those of a run; `folder`: of its prompts or offline rows, `counts`: of all that it has."""
        file = Path(folder).parent / REJECTED_FILE
        limit = config.data.max_rejected_fraction
        return Rejects(str(file), counts.num_rows, counts.num_rejected, limit, config.run.name, config.stage)

    def uids(self) -> np.ndarray:
        """int64, each once: rows that came to nothing with the teacher, however often (a restart tries again)."""
        entries = [json.loads(line) for line in Path(self.file).read_bytes().splitlines()]
        return np.unique(np.array([entry["uid"] for entry in entries if "uid" in entry], np.int64))

    @cached_property
    def _metrics(self) -> RayMetrics:  # of the process that rejects
        metrics = RayMetrics(self.run, self.stage)
        metrics.set("rows/rejected", self.num_rejected)
        return metrics

    def without_unasked(self, rows: pa.Table) -> pa.Table:
        """The rows without those that a teacher was not asked for, its budget being spent: they are left for another start.

        The run goes on to the end of what there is, and then ends with the reason.
        """
        reasons = [reason.removeprefix("error: ") for reason in rows["finish_reason"].to_pylist()]
        unasked = np.array([reason.startswith(NOT_ASKED) for reason in reasons], bool)
        if unasked.any():
            reason = reasons[int(np.flatnonzero(unasked)[-1])]
            Path(self.file).with_name(MISTAKE_FILE).write_text(f"some prompts were {reason}", encoding="utf-8")
        return rows.filter(pa.array(~unasked)).combine_chunks()

    def add(self, rows: pa.Table, uids: Sequence[int], reasons: Sequence[str]) -> None:
        """Append those of `rows` with these uids; raise DataError when too large a share of all rows is rejected by now."""
        self._metrics.add("rows/kept", rows.num_rows - len(uids))
        if not uids:
            return
        key = dict(zip(rows["uid"].to_pylist(), rows["key"].to_pylist(), strict=True))
        lines = [
            json.dumps({"key": key[uid], "uid": uid, "reason": reason}, ensure_ascii=False) + "\n"
            for uid, reason in zip(uids, reasons, strict=True)
        ]
        with open(self.file, "ab", buffering=0) as file:  # one write: lines of several extractors do not mix
            file.write("".join(lines).encode())
        refused = self.num_rejected + len(self.uids())
        self._metrics.set("rows/rejected", refused)
        if refused > self.limit * self.num_rows:
            raise DataError(
                f"{refused} of {self.num_rows} rows are unusable, more than data.max_rejected_fraction={self.limit} allows; "
                f"the last: {reasons[-1]} (all in {self.file})"
            )


class Extractor:
    """Stage 3: the teacher's answers to examples in the student's ids. Keeps new answers in the cache, and books rows that
    gave no example."""

    def __init__(self, config: Config, cache: TeacherCache, rejects: Rejects) -> None:
        self._tokenizer = load_tokenizer(config.teacher.tokenizer_folder)
        student = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
        self._match = compare_vocabularies(self._tokenizer, student).require()
        self._wanted = Wanted.by(config, self._tokenizer)
        self._curriculum = Curriculum.of(config, student)
        self._cache = cache
        self._rejects = rejects
        self._metrics = RayMetrics(config.run.name, config.stage)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A block of EXAMPLE_SCHEMA."""
        rows = self._rejects.without_unasked(rows)
        keep_new(rows, self._cache)
        self._tell(rows)
        examples, rejected = build_examples(rows, self._tokenizer, self._wanted)
        self._rejects.add(rows, rejected["uid"].to_pylist(), rejected["reason"].to_pylist())
        examples = remap_ids(_finish(rows, examples), self._match)
        if self._curriculum is None:
            return examples
        step_of = dict(zip(rows["epoch_uid"].to_pylist(), rows["step"].to_pylist(), strict=True))
        return self._curriculum.apply(examples, [step_of[uid] for uid in examples["uid"].to_pylist()])

    def _tell(self, rows: pa.Table) -> None:
        """What the teacher did for these rows, and how many of them it was not asked for."""
        times = [name for name in TIME_SCHEMA.names if name in rows.column_names]  # none where all rows are cached
        new = rows.select(["output_ids", *times]).filter(pa.array(~rows["cached"].to_numpy()))
        self._metrics.add("rows/cached", rows.num_rows - new.num_rows)
        self._metrics.add("teacher/tokens", len(new["output_ids"].combine_chunks().flatten()))
        for name in times:
            self._metrics.add(name.replace("_", "/", 1), float(new[name].to_numpy().sum()))


def keep_new(rows: pa.Table, cache: TeacherCache) -> None:
    """Write the answers that did not come from the cache into it."""
    cache.write(rows.filter(pa.array(~rows["cached"].to_numpy() & is_answered(rows))))


def is_answered(rows: pa.Table) -> np.ndarray:
    """[rows] bool: the teacher gave an answer."""
    return np.array([not reason.startswith("error") for reason in rows["finish_reason"].to_pylist()], bool)


def _finish(rows: pa.Table, examples: pa.Table) -> pa.Table:
    """Give the examples their uid of the epoch and the teacher's times."""
    order = np.argsort(rows["uid"].to_numpy())
    place = order[np.searchsorted(rows["uid"].to_numpy(), examples["uid"].to_numpy(), sorter=order)]
    source = rows.take(pa.array(place))
    columns = {name: examples[name] for name in EXAMPLE_SCHEMA.names}
    columns["uid"] = source["epoch_uid"]
    for name in ("teacher_seconds", "teacher_wait_seconds"):
        columns[name] = source[name] if name in source.column_names else pa.array(np.zeros(len(place), np.float32))
    return pa.table(columns).cast(EXAMPLE_SCHEMA)
