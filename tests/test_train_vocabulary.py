"""Runs whose student has tokens that its teacher lacks, or other ids: latent spans are trained, ids make no difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray.train import TrainingFailedError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raykd.cli import load_config
from raykd.data.examples import example_from_row
from raykd.data.sources import PromptSet
from raykd.data.stream import example_stream
from raykd.tracing import read_metrics
from raykd.train import _check_checkpoint, main
from raykd.training.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, read_ledger
from raykd.training.preflight import check
from raykd.types import Mark
from tests.conftest import save_tiny_model
from tests.moved_ids import save_moved

pytestmark = pytest.mark.ray

NUM_PROMPTS = 16
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    }
    for name in ("double", "dig")
]


def recorded(number: int) -> dict:
    """A conversation with reasoning steps, and every third with a tool call instead."""
    asked = {"role": "user", "content": f"double {number}"}
    if number % 3:
        text = f"Step 1: take {number}.\nStep 2: add {number}.\nThat makes {2 * number}."
        return {"messages": [asked, {"role": "assistant", "content": text}]}
    call = {"id": "1", "type": "function", "function": {"name": "double", "arguments": json.dumps({"n": number})}}
    result = {"role": "tool", "tool_call_id": "1", "content": json.dumps({"value": 2 * number + 100})}
    answer = {"role": "assistant", "content": f"It is {2 * number + 100}."}
    return {"messages": [asked, {"role": "assistant", "tool_calls": [call]}, result, answer], "tools": TOOLS}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, demo_tokenizer, tiny_model_path) -> Path:
    """A run of four steps on recorded conversations, with a checkpoint after every second."""
    folder = tmp_path_factory.mktemp("vocabulary")
    save_tiny_model(folder / "student", demo_tokenizer, seed=1, num_layers=1)
    rows = [json.dumps(recorded(number)) + "\n" for number in range(NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    config = {
        "run": {"dir": str(folder / "runs")},
        "teacher": {"kind": "hf", "model": str(tiny_model_path), "dtype": "float32", "top_k": 8, "max_model_len": 256},
        "student": {"model": str(folder / "student")},
        "data": {
            "prompts": str(folder / "prompts.jsonl"),
            "completions": "recorded",
            "teacher_cache": str(folder / "teacher_cache"),  # one for all runs: the same bits of the teacher
            "fixed_order": True,
        },
        "loss": {"kd": 1.0, "ce_truth": 1.0},
        "train": {"sequences_per_step": 4, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 2, "max_failures": 0},
        "tracking": {"tensorboard": False, "progress_bar": False},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def losses(run: Path) -> dict[str, list[float]]:
    """By name, of every step."""
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry]
    return {name: [entry[name] for entry in entries] for name in entries[0] if name.startswith("loss/")}


def no_teacher(dataset):
    raise AssertionError("a teacher was asked for although everything is cached")


@pytest.mark.parametrize("mode", ["mask", "continuous"])
def test_latent_spans_are_trained_with_tokens_that_are_new_to_the_student(config_file, ray_cluster, monkeypatch, mode):
    options = [
        f"run.name={mode}",
        "student.new_tokens={<bot>: start of thought, <eot>: '', <slot>: ''}",
        f"latent.mode={mode}",
        "latent.stages=[{steps: 1, slots: 2, probability: 1}]",
        "loss.caws_compliance=0.1",
    ]
    run = config_file.parent / "runs" / mode
    monkeypatch.setenv("RAYKD_FAULT", "worker:exit@step=3")
    with pytest.raises(TrainingFailedError):
        main(["--config", str(config_file), *options])
    monkeypatch.delenv("RAYKD_FAULT")
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    tokenizer = AutoTokenizer.from_pretrained(newest(run) / "student")
    bot, eot, slot = (tokenizer.get_vocab()[token] for token in ("<bot>", "<eot>", "<slot>"))
    at_two = load_file(newest(run) / "student" / "model.safetensors")["model.embed_tokens.weight"]

    assert main(["--config", str(config_file), *options, "--resume"]) == 0
    assert len(np.unique(read_ledger(newest(run)))) == NUM_PROMPTS
    at_four = load_file(newest(run) / "student" / "model.safetensors")["model.embed_tokens.weight"]
    moved = (at_four - at_two).abs().amax(dim=1)[[bot, eot, slot]]
    assert (moved > 1e-5).all(), "each of the new rows is trained, the slot's also as where its own filling starts"
    assert (moved < 0.01).all(), "and not set anew on the way"
    assert AutoConfig.from_pretrained(newest(run) / "student").vocab_size == len(at_four) == -(-(slot + 1) // 64) * 64
    served = AutoModelForCausalLM.from_pretrained(newest(run) / "student").get_output_embeddings()
    assert isinstance(served, nn.Linear)
    assert len(served.weight) == len(at_four)

    config = load_config([config_file], options)
    plan = check(config)
    assert _check_checkpoint(run, plan) == 0
    with pytest.raises(CheckpointError, match="has a student with vocabulary .*, the config's tokenizer has another"):
        _check_checkpoint(run, replace(plan, student_vocabulary="another"))
    prompts = PromptSet(**json.loads((run / "prompts" / "prompt_set.json").read_text())["prompt_set"])
    dataset = example_stream(config, prompts, 0, np.empty(0, np.int64), no_teacher)
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    examples = [example_from_row(block, index) for block in blocks for index in range(block.num_rows)]
    num_slots = [int(((example.marks & Mark.LATENT) != 0).sum()) for example in examples]
    assert sorted(num_slots) == [0] * 6 + [2] * 10
    example = examples[int(np.argmax(num_slots))]
    assert "assistant\n<bot><slot><slot><eot>Step 2: add" in tokenizer.decode(example.input_ids)
    assert example.input_ids[(example.marks & Mark.LATENT) != 0].tolist() == [slot] * 2


def test_the_two_modes_are_not_the_same(config_file, ray_cluster):
    """Reads what the runs above left: their first step starts from the same weights."""
    mask, continuous = (losses(config_file.parent / "runs" / mode)["loss/total"][0] for mode in ("mask", "continuous"))
    assert abs(mask - continuous) > 1e-4


def test_a_student_under_other_ids_has_the_same_losses(config_file, ray_cluster):
    losses_on = ["loss.tool_name=0.5", "loss.json_argument=0.5", "loss.json_grammar=0.5", "loss.copy_mass=0.5"]
    losses_on += ["loss.tool_choice=0.5", "loss.early_tool_call=0.5"]
    folder = config_file.parent
    save_moved(folder / "moved", folder / "student", extra=())
    assert main(["--config", str(config_file), "run.name=own_ids", *losses_on]) == 0
    assert main(["--config", str(config_file), "run.name=other_ids", f"student.model={folder / 'moved'}", *losses_on]) == 0
    expected, found = (losses(folder / "runs" / name) for name in ("own_ids", "other_ids"))
    names = {f"loss/{name}" for name in ("total", "kd", "ce_truth")} | {f"loss/{item[5:-4]}" for item in losses_on}
    assert names <= expected.keys(), "every loss has tokens to look at"
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5, rel=0), name
