"""Everything that can be known to go wrong before a model loads, and the start-up summary that shows the arithmetic.

In: Config, the files it names, the cluster's resources. Out: a `Plan`; ValueError with found / expected / what to change.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console, Group
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raykd.cli import connect_ray, run_folder
from raykd.config import Config
from raykd.data.cache import TeacherCache
from raykd.data.curriculum import latent_ids
from raykd.data.offline_stream import offline_files
from raykd.data.prompt_rows import load_tokenizer
from raykd.data.readers import find_files
from raykd.losses.intermediate import layer_pairs
from raykd.student.model import count_gathered_parameters, count_parameters, on_meta, student_config
from raykd.student.quantization import Int8Linear, prepare_int8
from raykd.student.tokenizer import rows_needed
from raykd.training.flow import flow_panels
from raykd.training.reference import needs_reference
from raykd.training.resources import resources_table
from raykd.training.sizing import (
    StudentSize,
    activation_bytes,
    activations_per_token,
    by_cluster,
    frozen_bytes,
    head_bytes,
    trained_bytes,
)
from raykd.vocabulary import VocabularyMatch, backend_of, compare_vocabularies, student_tokenizer, token_id
from teacher_serving.connect import contact
from teacher_serving.identity import (
    describe,
    read_text_config,
    state_bytes_per_token,
    vocabulary_fingerprint,
    vocabulary_size,
)
from teacher_serving.types import TeacherInfo

logger = logging.getLogger(__name__)

BYTES_PER_CHECKPOINT_PARAMETER = 12  # float32 weights and two Adam moments


class PreflightError(ValueError):
    """The run cannot work as configured."""


@dataclass(frozen=True)
class Plan:
    """What would run, known from files alone."""

    teacher: TeacherInfo
    student_size: StudentSize
    student_vocab_size: int
    student_vocabulary: str  # fingerprint, new tokens included
    activations_per_token: int  # values kept for the backward pass of one token, an estimate
    teacher_offer: str = ""  # what a teacher that runs elsewhere has said it gives


def check(config: Config) -> Plan:
    """Check the config against the files it names, wherever it is to run; load nothing.

    Errors: PreflightError, DataError, those of `describe` and `prepare_int8`.
    """
    offline_files(config)
    for key in ("prompts", "held_out") if config.data.prompts else ():
        path = getattr(config.data, key)
        if path is not None:
            find_files(path, f"data.{key}")
    if config.teacher.kind in ("served", "several"):
        connect_ray(config)  # a service may be in the run's own cluster
    teacher = describe(config.teacher)
    architecture = student_config(config.student)
    tokenizer = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
    match = compare_vocabularies(load_tokenizer(config.teacher.tokenizer_folder), tokenizer).require()
    architecture.vocab_size = _check_vocabulary(config, tokenizer, match, architecture.vocab_size)
    _check_end_of_turn(config, tokenizer, match.student_ids(teacher.eos_token_ids).tolist())
    _check_layers(config, architecture.num_hidden_layers)
    _check_int8(config, architecture)
    max_positions = _max_positions(architecture, teacher.max_model_len)
    if max_positions < teacher.max_model_len:
        raise PreflightError(
            f"the student has {max_positions} positions, the teacher up to {teacher.max_model_len} tokens: set "
            f"teacher.max_model_len={max_positions} or take a student with a longer context"
        )
    plan = Plan(
        teacher=teacher,
        student_size=StudentSize(
            count_parameters(architecture),
            count_gathered_parameters(architecture),
            architecture.vocab_size,
            architecture.hidden_size,
        ),
        student_vocab_size=architecture.vocab_size,
        student_vocabulary=vocabulary_fingerprint(backend_of(tokenizer)),
        activations_per_token=activations_per_token(config, architecture),
        teacher_offer=contact_teacher(config, teacher) if config.data.prompts else "",
    )
    return plan


def contact_teacher(config: Config, teacher: TeacherInfo) -> str:
    """Have a teacher that runs elsewhere say what it gives; empty for one that is loaded here.

    Errors: ValueError where it cannot be used, unless an earlier run has left answers: they may be all that is needed.
    """
    try:
        return contact(config.teacher, teacher, scoring=config.data.completions == "recorded")
    except ValueError as error:
        folder = config.data.teacher_cache or str(run_folder(config) / "teacher_cache")
        cache = TeacherCache(folder, teacher.fingerprint)
        if not cache.index().files:
            raise
        logger.warning("%s; going on with its answers in %s", error, cache.path)
        return f"cannot be asked now; there are answers in {cache.path}"


def _max_positions(architecture: PretrainedConfig, default: int) -> int:
    """Positions up to which a token's states do not depend on how long its batch is.

    longrope changes its frequencies with the length of the input: beyond the original context the same prefix has other
    states in a longer batch, in training as when writing.
    """
    max_positions = getattr(architecture, "max_position_embeddings", default)
    rope = getattr(architecture, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return max_positions
    return min(max_positions, rope.get("original_max_position_embeddings", max_positions))


def _check_vocabulary(config: Config, tokenizer: PreTrainedTokenizerBase, match: VocabularyMatch, num_rows: int) -> int:
    """Check the student's tokenizer, new tokens included, and its match with the teacher's against the losses and the
    `num_rows` of its model.

    Returns the rows that the model will have.
    """
    new_tokens, teacher_tokenizer = config.student.new_tokens, load_tokenizer(config.teacher.tokenizer_folder)
    without_row = [token for token, i in tokenizer.get_vocab().items() if i >= num_rows and token not in new_tokens]
    if without_row:
        raise PreflightError(
            f"the student's LM head has {num_rows} rows, its tokenizer {match.num_ids} ids: {len(without_row)} tokens have "
            f"no row, such as {sorted(without_row)[:3]}; there must be as many rows or more (padding is fine). Take the "
            "config.json that belongs to this tokenizer, or name the tokens that were added to it in student.new_tokens"
        )
    if config.teacher.top_k > vocabulary_size(teacher_tokenizer):
        raise PreflightError(
            f"teacher.top_k={config.teacher.top_k} is more than the vocabulary's {vocabulary_size(teacher_tokenizer)} "
            "tokens: choose a smaller top_k"
        )
    loss = config.loss
    if "kd" in loss.weights and loss.kd_support == "full" and loss.student_to_teacher and match.kind == "superset":
        raise PreflightError(
            f"loss.kd_support=full and loss.kd_divergence={loss.kd_divergence} (kd_beta={loss.kd_beta:g}) with a student of "
            f"{match.num_student - match.num_teacher} more tokens than its teacher: the student has mass where the teacher "
            "has none, the divergence is infinite; use kd_support=topk_tail, or another divergence"
        )
    if config.latent.stages:
        latent_ids(tokenizer, config.latent)
    if "caws_compliance" in loss.weights:
        token_id(tokenizer, config.latent.begin, "latent.begin")
        token_id(tokenizer, config.latent.end, "latent.end")
    return rows_needed(match.num_ids, num_rows)


def _check_end_of_turn(config: Config, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Losses that look at the student's end-of-turn token look at one of `ends`, which end the teacher's turns."""
    needing = sorted({"length_aware", "caws_compliance"} & config.loss.weights.keys())
    if needing and tokenizer.eos_token_id not in ends:
        raise PreflightError(
            f"loss.{needing[0]} looks at {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), the end-of-turn token of "
            f"{config.student.tokenizer_folder!r}, but the teacher ends its turns with "
            f"{tokenizer.convert_ids_to_tokens(ends)}: set eos_token of the student's tokenizer to that, or "
            "student.tokenizer to a folder where it is"
        )


def _check_layers(config: Config, num_student_layers: int) -> None:
    """The teacher layers that the losses need are among those shipped. `describe` has checked that these exist, the config
    that there are some where a loss needs any."""
    loss, shipped = config.loss, config.teacher.hidden_layers
    if not shipped:
        return
    num_teacher_layers = read_text_config(Path(config.teacher.tokenizer_folder))["num_hidden_layers"]
    if "intermediate_layer" in loss.weights:
        layer_pairs(loss.layer_map, num_student_layers, num_teacher_layers, shipped)
    if "kd" in loss.weights and loss.kd_support == "full" and shipped[-1] != num_teacher_layers - 1:
        raise PreflightError(
            f"loss.kd_support=full with teacher.hidden_layers={list(shipped)}: it needs the state after the teacher's last "
            f"layer; add {num_teacher_layers - 1} to teacher.hidden_layers"
        )


def _check_int8(config: Config, architecture: PretrainedConfig) -> None:
    """In stage qat: the policy fits the student. Errors: those of `prepare_int8`."""
    if config.stage != "qat":
        return
    model = on_meta(architecture)
    names = prepare_int8(model, config.quantization)
    if isinstance(model.get_output_embeddings(), Int8Linear):
        raise PreflightError(
            f"quantization.ignore={list(config.quantization.ignore)} leaves the LM head {names[-1]!r} to be quantised: the "
            'losses read its weight in float; add "lm_head"'
        )


def _disk(config: Config, plan: Plan) -> tuple[Path, int, int]:
    """Where checkpoints go, bytes free there, and bytes that those kept and one more need."""
    folder = Path(config.run.dir)
    while not folder.exists():
        folder = folder.parent
    needed = plan.student_size.parameters * BYTES_PER_CHECKPOINT_PARAMETER * (config.train.keep_checkpoints + 1)
    return folder, shutil.disk_usage(folder).free, needed


def check_disk(config: Config, plan: Plan) -> None:
    """There is room for the checkpoints. Errors: PreflightError."""
    folder, free, needed = _disk(config, plan)
    if free < needed:
        raise PreflightError(
            f"{folder} has {free / 2**30:.1f} GiB free; {config.train.keep_checkpoints} checkpoints and one more need "
            f"{needed / 2**30:.1f} GiB: free some, choose another run.dir, or lower train.keep_checkpoints"
        )


def print_summary(
    config: Config, plan: Plan, *, numbers: Mapping[str, int] | None, cluster: Mapping[str, float] | None
) -> None:
    """Print the resolved config, the batch arithmetic, the memory and the resources.

    `numbers`: rows of an epoch by kind, "prompts" and "offline"; None: not known yet.
    """
    parts = [
        Panel(Syntax(_yaml(config), "yaml", background_color="default"), title="resolved config"),
        Panel(_arithmetic(config, plan, numbers), title="the run in numbers"),
        Panel(resources_table(config, cluster), title="resources"),
    ]
    if numbers is None:  # only planned
        sizes = by_cluster(config, plan.student_size, plan.activations_per_token, reference=needs_reference(config))
        parts += [Panel(sizes, title="on GPUs"), *flow_panels(config)]
    Console().print(Group(*parts))


def num_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of the whole run, of `num_rows` an epoch: every epoch ends with a step for what is left."""
    per_epoch = -(-num_rows // config.train.sequences_per_step)
    return min(per_epoch * config.train.epochs, config.train.max_steps or 2**62)


def _yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip()


def _mixture(config: Config, numbers: Mapping[str, int] | None) -> Iterator[tuple[str, str]]:
    """What an epoch consists of: each kind of rows with its number and its share of a step, and the offline files."""
    titles = {"prompts": "prompts"} if config.data.prompts else {}
    titles |= {"offline": "offline rows"} if config.data.offline else {}
    for name, title in titles.items():
        if numbers is None:
            yield title, "counted when the run starts"
            continue
        share = numbers[name] / sum(numbers.values())
        of_a_step = f", {share:.1%} of every step ({share * config.train.sequences_per_step:.3g} sequences)"
        yield title, f"{numbers[name]:,} for training in an epoch" + (of_a_step if len(titles) > 1 else "")
    for file in config.data.offline:
        yield "", f"{file.weight:g} x {file.path}"


def _arithmetic(config: Config, plan: Plan, numbers: Mapping[str, int] | None) -> Table:
    train = config.train
    parameters, size = plan.student_size.parameters, plan.student_size
    table = Table(box=None, show_header=False)
    for name, text in _mixture(config, numbers):
        table.add_row(name, text)
    table.add_row(
        "one optimizer step",
        f"{train.sequences_per_step} sequences = {train.num_workers} workers x "
        f"{train.sequences_per_step / train.num_workers:g}, in micro-batches of at most "
        f"{train.max_tokens_per_micro_batch:,} padded tokens",
    )
    if numbers is not None:
        num_rows = sum(numbers.values())
        steps = num_steps(config, num_rows)
        table.add_row("steps", f"{steps:,} = {train.epochs} epochs x {-(-num_rows // train.sequences_per_step):,}")
    table.add_row("losses", ", ".join(f"{weight:g} x {name}" for name, weight in config.loss.weights.items()))
    table.add_row("student", f"{parameters:,} parameters, {plan.student_vocab_size:,} LM-head rows")
    table.add_row(
        "memory of a worker",
        f"{_mib(trained_bytes(config, size, train.num_workers))} weights, gradients and Adam moments (float32)"
        f"{' and copies for autocast' if train.precision == 'bfloat16' else ''}, "
        f"about {_mib(activation_bytes(config, plan.activations_per_token))} activations, "
        f"{_mib(head_bytes(config, size))} LM head and loss",
    )
    if needs_reference(config):
        table.add_row("student as it began", f"{_mib(frozen_bytes(config, size, train.num_workers))} more on every worker")
    folder, free, needed = _disk(config, plan)
    table.add_row(
        "checkpoints",
        f"{_mib(parameters * BYTES_PER_CHECKPOINT_PARAMETER)} each, at most {_mib(needed)}; {_mib(free)} free in {folder}",
    )
    teacher, top_k = plan.teacher, config.teacher.top_k
    token_bytes = 6 * top_k + 12 + state_bytes_per_token(config.teacher)
    if not config.data.prompts:
        table.add_row("teacher", f"none is started; ids and scores of {teacher.teacher_id} are in the files")
        return table
    what = f"top-{top_k}" if top_k else "text alone: sequence-level distillation"
    table.add_row("teacher", f"{teacher.teacher_id}, fingerprint {teacher.fingerprint}, {what}")
    if plan.teacher_offer:
        table.add_row("", plan.teacher_offer)
    table.add_row(
        "teacher output",
        f"{token_bytes} bytes a token on the wire; at most {config.data.max_lead_tokens:,} tokens ahead of the trainer "
        f"= {_mib(config.data.max_lead_tokens * token_bytes)}",
    )
    return table


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
