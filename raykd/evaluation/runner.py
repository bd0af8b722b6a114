"""Runs the models that are judged: each writes greedily on the same prompts through the same engine, one after another.

In:  Config, and the models to compare with the teacher.
Out: `Results`, saved beside everything the models wrote. Raises EvaluationError before anything loads where a model or the
     data is missing.

Every model lives in a process of its own (a Ray actor for an engine, a Ray task for plain torch), never in the driver, and
never an engine next to plain torch. While an engine writes nothing else of ours runs: its speed is measured.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import AutoConfig, AutoTokenizer

from raykd.config import Config
from raykd.data.detokenize import decode_tokens
from raykd.evaluation.answer_scores import score_answer
from raykd.evaluation.head_rows import HeadRows, load_head_rows
from raykd.evaluation.head_scores import halting_by_tier, head_estimates, run_heads
from raykd.evaluation.metrics import score_completion, score_first_call
from raykd.evaluation.models import (
    ModelFiles,
    check_model,
    heads_of,
    make_int8,
    make_untrained,
    match_vocabulary,
    weight_bytes,
)
from raykd.evaluation.prompts import EvaluationError, JudgedPrompt, JudgedPrompts, load_judged_prompts
from raykd.evaluation.results import TEACHER, UNTRAINED, Judged, Results, save_results, summarise
from raykd.evaluation.serving import get_result, require_int8_device
from raykd.evaluation.timing import Speed, describe_machine, speed_facts, time_prompts
from raykd.evaluation.token_scores import score_by_teacher
from raykd.student.int8_files import int8_section, is_int8
from raykd.student.model import count_parameters
from raykd.vocabulary import VocabularyMatch, remap_ids
from teacher_serving.config import HfTeacherConfig, LocalTeacherConfig, SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect, cpu_environment, resolve_device
from teacher_serving.identity import describe, model_fingerprint
from teacher_serving.types import TeacherInfo

logger = logging.getLogger(__name__)

MADE = "made"
"""Folder of the models that are made for the occasion, within the report's; removed afterwards."""
SCORING_COLUMNS = ("topk_ids", "topk_logprobs", "log_tail")


def evaluate(config: Config, models: Mapping[str, ModelFiles], folder: Path) -> Results:
    """Judge the teacher, `models` by name, and the untrained student; save results.json and completions.jsonl to `folder`.

    Needs a Ray cluster. In `folder` and for as long as it takes, the untrained student is made again from config.student and
    run.seed (not where the run goes on from another), and students of stage qat become the INT8 models they were trained as.
    """
    if not isinstance(config.teacher, LocalTeacherConfig):
        raise EvaluationError(
            f"teacher.kind={config.teacher.kind}: the teacher is judged beside the students, with an engine of its own; "
            "give a config whose teacher is a model folder (kind: vllm or hf)"
        )
    info = describe(config.teacher)
    for name, files in models.items():
        check_model(config, name, files)
    prompts = load_judged_prompts(config, info)
    rows = _head_rows(config, models, info)
    table = prompts.table()
    try:
        made = _make(config, models, folder / MADE)
        judged, teacher_rows = _judge_teacher(config, info, prompts, made)
        ready = {name: get_result(made[name]) if name in made else models[name] for name in {**models, **made}}
        for name, files in ready.items():
            answers, _, speed = write(config, files.folder, name, info, prompts, keep_scores=False)
            judged[name] = _judge(config, files.folder, answers, speed, prompts, judged[TEACHER].texts)
        scoring = {
            name: _task(config, score_by_teacher).remote(
                config.student,
                str(files.folder),
                config.teacher.tokenizer_folder,
                table,
                teacher_rows,
                config.train.threads_per_worker,
            )
            for name, files in ready.items()
        }
        reading = {
            name: _task(config, run_heads).remote(config, files, rows, info.eos_token_ids)
            for name, files in ready.items()
            if rows is not None and heads_of(files)
        }
        for name, reference in scoring.items():
            for score, more in zip(judged[name].scores, get_result(reference), strict=True):
                score.update(more)
        for name, reference in reading.items():
            assert rows is not None, "heads were read on rows"
            outputs = get_result(reference)
            judged[name].of_heads = head_estimates(rows, outputs, config)
            judged[name].by_tier = halting_by_tier(rows, outputs, config)
    finally:
        shutil.rmtree(folder / MADE, ignore_errors=True)
    for name, files in models.items():
        judged[name].path = str(files.folder)  # where the user has it
    results = summarise(judged, prompts, config, rows.source if rows is not None else None)
    save_results(results, judged, prompts, folder)
    return results


def _head_rows(config: Config, models: Mapping[str, ModelFiles], info: TeacherInfo) -> HeadRows | None:
    """What heads are judged on; None where no model has any, or the data has nothing to judge them on."""
    if any(heads_of(files) for files in models.values()):
        return load_head_rows(config, info)
    if config.evaluate.refinements is not None:
        raise EvaluationError(
            f"evaluate.refinements={config.evaluate.refinements}, but none of {', '.join(models)} has a halt or a "
            "self-evaluation head: train with loss.halt or loss.self_evaluation above 0, or leave evaluate.refinements out"
        )
    return None


def _make(config: Config, models: Mapping[str, ModelFiles], folder: Path) -> dict[str, ray.ObjectRef]:
    """Begin to make the models of which there are no files yet, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        name: _task(config, make_int8).remote(config.student, files, folder / name)
        for name, files in models.items()
        if files.quantization is not None
    }
    if config.init.from_ is None:  # else training began with a student of another run, which may be named
        made[UNTRAINED] = _task(config, make_untrained).remote(config.student, config.run.seed, folder / UNTRAINED)
    return made


def _judge_teacher(
    config: Config, info: TeacherInfo, prompts: JudgedPrompts, made: Mapping[str, ray.ObjectRef]
) -> tuple[dict[str, Judged], ray.ObjectRef]:
    """The teacher with the scores of its texts, and a reference to its answers with their top-k."""
    teacher = Path(config.teacher.tokenizer_folder)
    answers, rows, speed = write(config, teacher, TEACHER, info, prompts, keep_scores=True, after=list(made.values()))
    judged = _judge(config, teacher, answers, speed, prompts, None)
    for score, nats in zip(judged.scores, _own_nats(answers), strict=True):
        score["perplexity"] = nats
    return {TEACHER: judged}, rows


def _judge(
    config: Config, path: Path, answers: pa.Table, speed: Speed, prompts: JudgedPrompts, teacher_texts: list[str] | None
) -> Judged:
    """Decode and score what a model wrote; without `teacher_texts` it is the teacher."""
    judged = Judged(
        path=str(path),
        fingerprint=model_fingerprint(path),
        num_parameters=count_parameters(AutoConfig.from_pretrained(path)),
        machine=speed.machine,
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    num_tokens = 0
    for index, prompt in enumerate(prompts.prompts):
        ids = answers["output_ids"][index].values.to_numpy()
        num_tokens += len(ids)
        if answers["finish_reason"][index].as_py() == "stop":
            ids = ids[:-1]  # the token that ends the turn
        written = decode_tokens(tokenizer, ids)
        score = score_completion(written.text, prompt.messages, prompt.tools, prompt.gold)
        if prompt.gold.calls:
            score |= score_first_call(written, prompt.tools)
        score |= score_answer(
            written.text,
            teacher_texts[index] if teacher_texts is not None else None,
            prefers_code=prompt.prefers_code,
            caws_tier=prompt.caws_tier,
        )
        judged.texts.append(written.text)
        judged.scores.append(score)
    calls = [judged.scores[prompt.uid].get("first_call_tokens") for prompt in timed_prompts(config, prompts)]
    judged.facts = {"weight_bytes": float(weight_bytes(path))}
    judged.facts |= speed_facts(speed, num_tokens, [call[0] for call in calls if call is not None])
    return judged


def timed_prompts(config: Config, prompts: JudgedPrompts) -> list[JudgedPrompt]:
    """The prompts that are asked alone: the first ones that need a call; where none does, the first ones."""
    with_calls = [prompt for prompt in prompts.prompts if prompt.gold.calls]
    return (with_calls or prompts.prompts)[: config.evaluate.num_timed]


def _own_nats(answers: pa.Table) -> list[tuple[float, float]]:
    """(nats, tokens) of every completion under the model that wrote it."""
    logprobs = [cell.values.to_numpy() for cell in answers["sampled_logprob"]]
    return [(-float(row.sum(dtype=np.float64)), float(len(row))) for row in logprobs]


# --- engines: one actor at a time -----------------------------------------------------------------------------------------


def write(
    config: Config,
    path: Path,
    name: str,
    teacher: TeacherInfo,
    prompts: JudgedPrompts,
    *,
    keep_scores: bool,
    after: Sequence[ray.ObjectRef] = (),
) -> tuple[pa.Table, ray.ObjectRef, Speed]:
    """Have the model in `path` answer all prompts, greedily, in an actor that ends with it. The prompts are in the teacher's
    ids, the answers in the model's. While the engine starts, the tasks `after` may run; it is asked when they are done.

    Returns the answers without their top-k columns, a reference to the whole table of TEACHER_OUTPUT_SCHEMA (which with
    `keep_scores` has the configured top-k), and how fast it was. Raises EvaluationError where a prompt came back without an
    answer.
    """
    match = match_vocabulary(config, path)
    engine = _engine_config(config, path, name, teacher, match, keep_scores=keep_scores)
    environment = {"PYTHONWARNINGS": "ignore", **(cpu_environment(engine) if engine.device == "cpu" else {})}
    actor = ray.remote(Writer).options(
        num_cpus=engine.num_cpus, num_gpus=engine.gpus_per_actor, runtime_env={"env_vars": environment}
    )
    logger.info("%s (%s) answers %d prompts", name, path, len(prompts.prompts))
    writer: Any = actor.remote(engine)
    asked = remap_ids(prompts.table().select(["uid", "prompt_ids"]), match)
    timed = asked.take([prompt.uid for prompt in timed_prompts(config, prompts)])
    get_result(list(after))
    answers, whole, speed = writer.write.options(num_returns=3).remote(asked, timed)
    table = get_result(answers)
    get_result(writer.close.remote())
    ray.kill(writer)
    reasons = table["finish_reason"].to_pylist()
    failed = [reason for reason in reasons if reason.startswith("error")]
    if failed:
        raise EvaluationError(
            f"{name}: {len(failed)} of {len(reasons)} prompts came back without an answer; the first: {failed[0]}"
        )
    return table, whole, get_result(speed)


class Writer:
    """Actor: an engine that answers prompts."""

    def __init__(self, config: VllmTeacherConfig | HfTeacherConfig) -> None:
        if config.device == "cuda" and is_int8(Path(config.model)):
            require_int8_device(torch.cuda.get_device_capability())
        self._config = config
        self._engine = connect(config)

    def write(self, prompts: pa.Table, timed: pa.Table) -> tuple[pa.Table, pa.Table, Speed]:
        """The answers without their top-k columns, and whole; speed. First of all asks those of `timed` alone."""
        timings = time_prompts(self._engine, timed)
        began = time.perf_counter()
        output = self._engine.generate(prompts)
        machine = describe_machine(self._config.device, self._config.num_threads)
        speed = Speed(timings, time.perf_counter() - began, machine)
        return output.drop_columns(list(SCORING_COLUMNS)), output, speed

    def close(self) -> None:
        self._engine.close()


def _engine_config(
    config: Config, path: Path, name: str, teacher: TeacherInfo, match: VocabularyMatch, *, keep_scores: bool
) -> Any:
    """The teacher's engine settings for any model: same context, greedy, one replica. An INT8 model is served in the type,
    and in as many shards, as it was made for."""
    assert isinstance(config.teacher, LocalTeacherConfig), "a teacher without files of its own cannot be judged"
    stop = config.teacher.sampling.stop_token_ids
    values = config.teacher.model_dump() | {
        "model": str(path),
        "teacher_id": name,
        "sampling": SamplingConfig(
            max_tokens=config.evaluate.max_tokens,
            stop_token_ids=None if stop is None else tuple(match.student_ids(stop).tolist()),
        ),
        "max_model_len": teacher.max_model_len,
        "top_k": config.teacher.top_k if keep_scores else 1,
        "hidden_layers": (),
        "num_replicas": 1,
        "max_replicas": None,
    }
    if is_int8(path):
        values["dtype"] = "auto"
        if isinstance(config.teacher, VllmTeacherConfig):
            values |= {"tensor_parallel_size": int8_section(path)["activation_shards"], "num_gpus": None}
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    return resolve_device(type(config.teacher).model_validate(values), has_gpu=has_gpu)


# --- plain torch: tasks that end ------------------------------------------------------------------------------------------


def _task(config: Config, function: Any) -> Any:
    return ray.remote(function).options(num_cpus=config.train.cpus_per_worker, num_gpus=int(config.train.use_gpu))
