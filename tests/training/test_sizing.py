"""raykd/training/sizing.py: the arithmetic of clusters that nobody has at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from raykd.cli import load_config
from raykd.training.sizing import StudentSize, activations_per_token, layout, teacher_bytes, worker_bytes

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("recipe", "num_gpus", "workers", "teachers"),
    [
        ("qwen3_8b_to_0.6b", 8, 2, 6),
        ("qwen3_8b_to_0.6b", 64, 16, 48),
        ("qwen3_8b_to_0.6b", 1, 0, 1),
        ("qwen3_32b_to_1.7b", 8, 4, 1),
        ("qwen3_32b_to_1.7b", 64, 32, 8),
        ("qwen3_32b_to_1.7b", 4, 0, 1),
        ("llama3_8b_to_1b", 8, 3, 5),
    ],
)
def test_gpus_are_shared_out_in_the_ratio_of_the_config(recipe, num_gpus, workers, teachers):
    found = layout(load_config([CONFIGS / f"{recipe}.yaml"]), num_gpus)
    assert (found.workers, found.teachers) == (workers, teachers)
    assert found.workers + found.teachers * found.gpus_per_teacher <= max(num_gpus, found.gpus_per_teacher)


def test_memory_is_eighteen_bytes_a_parameter_in_bfloat16_and_what_a_step_needs_and_a_teacher_is_cut_by_its_gpus(tmp_path):
    Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=100, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    config = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], [f"teacher.model={tmp_path}", "teacher.dtype=auto"])
    head = 10 * 4 * 4 + 32_768 * 10 * 2 + 512 * 10 * 4  # its gradient; the logits' gradient, and some rows of logits
    assert worker_bytes(config, StudentSize(1000, 10, 4), 10) == 18_000 + 32_768 * 10 * 2 + head
    whole = teacher_bytes(config, 1)
    assert teacher_bytes(config, 4) == whole / 4
    in_float = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], [f"teacher.model={tmp_path}", "teacher.dtype=float32"])
    assert teacher_bytes(in_float, 1) == 2 * whole


@pytest.mark.parametrize(
    ("checkpointing", "measured"), [(False, 45.9), (False, 43.1), (True, 32.5)], ids=["float", "int8", "checkpointing"]
)
def test_the_plan_is_within_a_tenth_of_what_was_measured_on_a_gpu(checkpointing, measured):
    """GiB at the peak of a step of a student of the shape of Qwen3-1.7B, 4 sequences of 1024 tokens a micro-batch, on an
    H200 by scripts/bench_gpu_step.py."""
    architecture = Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    settings = ["train.max_tokens_per_micro_batch=4096", f"train.gradient_checkpointing={checkpointing}"]
    config = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], settings)
    size = StudentSize(1_720_574_976, architecture.vocab_size, architecture.hidden_size)
    assert worker_bytes(config, size, activations_per_token(config, architecture)) / 2**30 == pytest.approx(
        measured, rel=0.1
    )
