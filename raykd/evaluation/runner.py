"""Runs the models that are judged: each writes greedily on the same prompts through the same engine, one after another.

In:  Config, and the folders of the models to compare with the teacher.
Out: `Results`, saved beside everything the models wrote. Raises EvaluationError before anything loads where a model or the
     data is missing.

Every model lives in a process of its own (a Ray actor for an engine, a Ray task for the student's own forward pass), never
in the driver, and never an engine next to plain torch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raykd.config import Config, StudentConfig
from raykd.data.detokenize import decode_tokens
from raykd.data.prompt_rows import load_tokenizer
from raykd.evaluation.metrics import score_completion
from raykd.evaluation.prompts import EvaluationError, JudgedPrompts, load_judged_prompts
from raykd.evaluation.results import TEACHER, Judged, Results, save_results, summarise
from raykd.evaluation.token_scores import score_by_teacher
from raykd.student.model import count_parameters, load_student
from raykd.vocabulary import VocabularyMatch, compare_vocabularies, remap_ids, student_tokenizer
from teacher_serving.config import HfTeacherConfig, LocalTeacherConfig, SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect, cpu_environment, resolve_device
from teacher_serving.identity import describe, model_fingerprint
from teacher_serving.types import TeacherInfo

logger = logging.getLogger(__name__)

UNTRAINED = "untrained"
SCORING_COLUMNS = ("topk_ids", "topk_logprobs", "log_tail")


def evaluate(config: Config, models: Mapping[str, Path], folder: Path) -> Results:
    """Judge the teacher, `models` by name, and the untrained student; save results.json and completions.jsonl to `folder`.

    Needs a Ray cluster. The untrained student is made again from config.student and run.seed, in `folder`, and removed.
    """
    info = describe(config.teacher)
    for name, path in models.items():
        _check_model(config, name, path)
    prompts = load_judged_prompts(config, info)
    table = prompts.table()
    untrained = folder / UNTRAINED
    untrained.mkdir(parents=True, exist_ok=True)
    try:
        made = ray.remote(make_untrained).remote(config.student, config.run.seed, str(untrained))
        answers, teacher_rows = write(config, Path(config.teacher.model), TEACHER, info, table, keep_scores=True)
        judged = {TEACHER: _judge(Path(config.teacher.model), answers, prompts)}
        for score, nats in zip(judged[TEACHER].scores, _own_nats(answers), strict=True):
            score["perplexity"] = nats
        scoring = {}
        for name, path in {**models, UNTRAINED: untrained}.items():
            if name == UNTRAINED:
                _get(made)
            scoring[name] = _task(config, score_by_teacher).remote(
                config.student, str(path), config.teacher.model, table, teacher_rows, config.train.threads_per_worker
            )
            answers, _ = write(config, path, name, info, table, keep_scores=False)
            judged[name] = _judge(path, answers, prompts)
        for name, reference in scoring.items():
            for score, more in zip(judged[name].scores, _get(reference), strict=True):
                score.update(more)
    finally:
        shutil.rmtree(untrained, ignore_errors=True)
    results = summarise(judged, prompts, config)
    save_results(results, judged, prompts, folder)
    return results


def _check_model(config: Config, name: str, path: Path) -> None:
    if name in (TEACHER, UNTRAINED):
        raise EvaluationError(f"a model is named {name!r}: that name is taken; choose another")
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise EvaluationError(
            f"model {name!r}: found no Hugging Face model in {path}, expected config.json and *.safetensors; train the "
            "student first, or correct the path"
        )
    _match_vocabulary(config, path)


def _match_vocabulary(config: Config, path: Path) -> VocabularyMatch:
    """What the vocabulary of the model in `path` has to do with the teacher's. Raises ValueError where it is different."""
    return compare_vocabularies(load_tokenizer(config.teacher.model), student_tokenizer(path, ())).require()


def _judge(path: Path, answers: pa.Table, prompts: JudgedPrompts) -> Judged:
    """Decode and score what a model wrote."""
    judged = Judged(
        path=str(path),
        fingerprint=model_fingerprint(path),
        num_parameters=count_parameters(AutoConfig.from_pretrained(path)),
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    for index, prompt in enumerate(prompts.prompts):
        ids = answers["output_ids"][index].values.to_numpy()
        if answers["finish_reason"][index].as_py() == "stop":
            ids = ids[:-1]  # the token that ends the turn
        text = decode_tokens(tokenizer, ids).text
        judged.texts.append(text)
        judged.scores.append(score_completion(text, prompt.messages, prompt.tools, prompt.gold))
    return judged


def _own_nats(answers: pa.Table) -> list[tuple[float, float]]:
    """(nats, tokens) of every completion under the model that wrote it."""
    logprobs = [cell.values.to_numpy() for cell in answers["sampled_logprob"]]
    return [(-float(row.sum(dtype=np.float64)), float(len(row))) for row in logprobs]


# --- engines: one actor at a time -----------------------------------------------------------------------------------------


def write(
    config: Config, path: Path, name: str, teacher: TeacherInfo, prompts: pa.Table, *, keep_scores: bool
) -> tuple[pa.Table, ray.ObjectRef]:
    """Have the model in `path` answer all prompts, greedily, in an actor that ends with it. The prompts are in the teacher's
    ids, the answers in the model's.

    Returns the answers without their top-k columns, and a reference to the whole table of TEACHER_OUTPUT_SCHEMA (which
    with `keep_scores` has the configured top-k). Raises EvaluationError where a prompt came back without an answer.
    """
    match = _match_vocabulary(config, path)
    engine = _engine_config(config, path, name, teacher, match, keep_scores=keep_scores)
    environment = {"PYTHONWARNINGS": "ignore", **(cpu_environment(engine) if engine.device == "cpu" else {})}
    actor = ray.remote(Writer).options(
        num_cpus=engine.num_cpus, num_gpus=engine.gpus_per_actor, runtime_env={"env_vars": environment}
    )
    logger.info("%s (%s) answers %d prompts", name, path, prompts.num_rows)
    writer: Any = actor.remote(engine)
    answers, whole = writer.write.options(num_returns=2).remote(remap_ids(prompts.select(["uid", "prompt_ids"]), match))
    table = _get(answers)
    _get(writer.close.remote())
    ray.kill(writer)
    reasons = table["finish_reason"].to_pylist()
    failed = [reason for reason in reasons if reason.startswith("error")]
    if failed:
        raise EvaluationError(
            f"{name}: {len(failed)} of {len(reasons)} prompts came back without an answer; the first: {failed[0]}"
        )
    return table, whole


class Writer:
    """Actor: an engine that answers prompts."""

    def __init__(self, config: VllmTeacherConfig | HfTeacherConfig) -> None:
        self._engine = connect(config)

    def write(self, prompts: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The answers without their top-k columns, and whole."""
        output = self._engine.generate(prompts)
        return output.drop_columns(list(SCORING_COLUMNS)), output

    def close(self) -> None:
        self._engine.close()


def _engine_config(
    config: Config, path: Path, name: str, teacher: TeacherInfo, match: VocabularyMatch, *, keep_scores: bool
) -> Any:
    """The teacher's engine settings for any model: same context, greedy, one replica."""
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
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    return resolve_device(type(config.teacher).model_validate(values), has_gpu=has_gpu)


# --- plain torch: tasks that end ------------------------------------------------------------------------------------------


def _task(config: Config, function: Any) -> Any:
    return ray.remote(function).options(num_cpus=config.train.cpus_per_worker, num_gpus=int(config.train.use_gpu))


def make_untrained(student: StudentConfig, seed: int, folder: str) -> None:
    """Task: save the student as training started from it."""
    disable_progress_bar()
    load_student(student, seed).save(Path(folder))


def _get(reference: Any) -> Any:
    """ray.get, with a user's mistake as the ValueError that it is."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ValueError) else error) from None
