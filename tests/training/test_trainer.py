"""A trainer on a GPU: it trains what it trains on the CPU, waits for the device once a step, and is not tied to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from raykd.config import Config
from raykd.data.examples import examples_to_table
from raykd.losses.context import LossContext
from raykd.training import loop
from raykd.training.checkpoint import STUDENT, latest_checkpoint
from raykd.training.trainer import Trainer, make_trainer
from raykd.types import EXAMPLE_SCHEMA, Example, Mark, Source
from tests.conftest import needs_gpu
from tests.training.tiny_run import VOCAB, make_config, make_pairs, make_rows, run, run_on_two_ranks, weights

DEVICE = "cuda:0"
TEACHER_H = 24
NO_TEACHER = {"kd": 0.0, "ce_teacher": 0.0, "tool_name": 0.0}
TRAIN = {"precision": "bfloat16", "max_tokens_per_micro_batch": 48}
SECTIONS: dict[str, dict[str, Any]] = {
    "kd": {},
    "float32": {"train": TRAIN | {"precision": "float32"}},
    "checkpointing": {"train": TRAIN | {"gradient_checkpointing": True}},
    "qat": {"stage": "qat", "quantization": {"activation_grid": "cuda", "smoothing": 0.5}},
    "qat, self_kd": {"stage": "qat", "loss": NO_TEACHER | {"self_kd": 1.0, "ce_teacher": 0.5}},
    "pairs": {
        "loss": NO_TEACHER | {"code_mode_preference": 1.0},
        "data": {"prompts": None, "offline": [{"path": "pairs.jsonl"}]},
    },
    "heads": {"loss": {"halt": 1.0, "self_evaluation": 1.0}},
    "layers": {"loss": NO_TEACHER | {"intermediate_layer": 1.0}, "teacher": {"hidden_layers": [1]}},
}


def config_of(name: str, student_path: Path, **train: Any) -> Config:
    sections = {"train": TRAIN} | SECTIONS[name]
    return make_config(student_path, **sections | {"train": sections["train"] | train})


def rows_of(name: str, first_uid: int = 0) -> pa.Table:
    """The same eight rows under any uids, with what the losses of a case look at."""
    if name == "pairs":
        return make_pairs(8, seed=1, first_uid=first_uid)
    if name == "layers":
        return examples_to_table([with_teacher_states(row, first_uid) for row in range(8)])
    rows = make_rows(8).to_pylist()
    for number, row in enumerate(rows):
        row["uid"] += first_uid
        if name == "heads":
            row["marks"] = [mark | Mark.DECISION if place in (2, 3) else mark for place, mark in enumerate(row["marks"])]
            row["halt_targets"], row["quality"] = [0.0, 1.0], number / 8
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def with_teacher_states(row: int, first_uid: int) -> Example:
    random = np.random.default_rng(row)
    return Example(
        uid=first_uid + row,
        source=Source.TEACHER,
        input_ids=random.integers(0, VOCAB, 9).astype(np.int32),
        marks=np.array([0, 0] + 7 * [Mark.RESPONSE], np.uint16),
        topk_ids=np.empty((7, 0), np.int32),
        topk_logprobs=np.empty((7, 0), np.float16),
        log_tail=np.empty(0, np.float32),
        teacher_hidden=random.normal(size=(1, 9, TEACHER_H)).astype(np.float16),
    )


def again_and_again(name: str, num_steps: int) -> list[pa.Table]:
    """The same rows in every step, as new ones."""
    return [rows_of(name, first_uid=100 * step) for step in range(num_steps)]


def train(name: str, config: Config, folder: Path, tables: list[pa.Table], device: str = DEVICE, **options: Any):
    if name == "layers":
        context = LossContext(layer_pairs={1: 0}, num_teacher_layers=1)
        options |= {"context": context, "projections": {1: (32, TEACHER_H)}}
    return run(config, folder, tables, device=torch.device(device), **options)


@needs_gpu
@pytest.mark.parametrize("name", SECTIONS)
def test_on_a_gpu_a_run_learns_and_its_checkpoint_is_the_same_on_the_cpu(name, student_path, tmp_path):
    config = config_of(name, student_path, log_every=1)
    trainer, logged = train(name, config, tmp_path, again_and_again(name, 20), num_steps=20)
    losses = [metrics["loss/total"] for _, metrics in logged if "loss/total" in metrics]
    assert trainer.progress.step == len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    assert {parameter.device.type for parameter in trainer.student.parameters()} == {torch.device(DEVICE).type}
    assert_same_on_the_cpu(trainer)


def assert_same_on_the_cpu(trainer: Trainer) -> None:
    """The newest checkpoint, loaded there, to the bit: weights, heads, Adam's moments, and the folder that is served."""
    context = LossContext(layer_pairs=trainer.context.layer_pairs, num_teacher_layers=trainer.loss_state.num_layers)
    projections = {1: (32, TEACHER_H)} if context.layer_pairs else None
    made = {"num_steps": trainer.num_steps, "teacher": trainer.teacher, "context": context, "projections": projections}
    again = make_trainer(trainer.config, trainer.run_folder, **made)
    assert again.progress == trainer.progress
    twins = dict(again.student.named_parameters())
    for name, parameter in trainer.student.named_parameters():
        assert torch.equal(parameter.cpu(), twins[name]), name
        for key, value in trainer.optimizer.state[parameter].items():
            assert torch.equal(value.cpu(), again.optimizer.state[twins[name]][key]), (name, key)
    newest = latest_checkpoint(trainer.run_folder)
    assert newest is not None
    served = AutoModelForCausalLM.from_pretrained(newest / STUDENT, dtype=torch.float32)
    for name, value in served.state_dict().items():
        assert torch.equal(value, trainer.student.model.state_dict()[name].cpu()), name


@needs_gpu
def test_on_a_gpu_the_weights_are_those_of_the_cpu(student_path, tmp_path):
    # Adam turns rounding errors of gradients near zero into steps of up to the learning rate: it is a usual one here.
    config = config_of("float32", student_path, learning_rate=1e-4)
    rows = [make_rows(32)]
    on_cpu, expected = train("float32", config, tmp_path / "cpu", rows, "cpu")
    on_gpu, logged = train("float32", config, tmp_path / "gpu", rows)
    for (_, metrics), (_, wanted) in zip(logged, expected, strict=True):
        assert metrics["loss/total"] == pytest.approx(wanted["loss/total"], rel=1e-5)
    for name, value in weights(on_cpu).items():
        assert (weights(on_gpu)[name].cpu() - value).abs().max() <= 1e-5, name


@needs_gpu
@pytest.mark.parametrize("name", ["kd", "qat"])
def test_on_a_gpu_an_interrupted_run_ends_with_the_same_bits(name, student_path, tmp_path):
    config = config_of(name, student_path)
    rows = [make_rows(48)]
    whole, _ = train(name, config, tmp_path / "whole", rows)
    asked = iter([False, False, False, True])
    part, _ = train(name, config, tmp_path / "parts", rows, stop=lambda: next(asked))
    assert part.progress.step == 3
    rest, _ = train(name, config, tmp_path / "parts", rows)
    assert rest.progress == whole.progress
    for tensor, value in weights(whole).items():
        assert torch.equal(weights(rest)[tensor], value), tensor
    torch.rand(3, device=DEVICE)
    drawn = torch.rand(1, device=DEVICE)
    train(name, config, tmp_path / "whole", [])  # takes back the states of the generators
    torch.rand(3, device=DEVICE)
    assert torch.equal(torch.rand(1, device=DEVICE), drawn)


@pytest.fixture
def waits(monkeypatch) -> list[list[str]]:
    """For every step the files where the host waited for the device."""
    steps: list[list[str]] = []
    make_step = loop.step

    def watched(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                make_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [entry for entry in caught if "synchronizing" in str(entry.message)]
        steps.append([f"{Path(entry.filename).name}:{entry.lineno}" for entry in found])

    monkeypatch.setattr(loop, "step", watched)
    return steps


@needs_gpu
@pytest.mark.parametrize("name", SECTIONS)
def test_on_a_gpu_the_host_waits_once_a_step(name, student_path, tmp_path, waits):
    """Apart from transformers, which looks in every forward pass whether several sequences share a row."""
    config = config_of(name, student_path, max_tokens_per_micro_batch=24)
    train(name, config, tmp_path, again_and_again(name, 4))
    lines = Path(loop.__file__).read_text().splitlines()
    assert len(waits) == 4
    for places in waits:
        ours = [place for place in places if not place.startswith("masking_utils.py")]
        [(file, number)] = [place.split(":") for place in ours]
        assert (file, "isfinite(grad_norm)" in lines[int(number) - 1]) == ("loop.py", True)


@needs_gpu
@pytest.mark.slow
def test_two_workers_on_a_gpu_change_nothing(student_path, tmp_path):
    """They share the one GPU here, and so exchange gradients by gloo."""
    config = config_of("float32", student_path, learning_rate=1e-4)
    one, _ = train("float32", config, tmp_path / "one", [make_rows(8)])
    halves = [make_rows(8).slice(0, 4)], [make_rows(8).slice(4)]
    two, _ = run_on_two_ranks(config, tmp_path / "two", list(halves), DEVICE)
    for name, value in weights(one).items():
        assert (two[name] - value).abs().max() <= 1e-6, name
