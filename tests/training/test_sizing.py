"""raykd/training/sizing.py: the arithmetic of clusters that nobody has at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from raykd.cli import load_config
from raykd.training.sizing import layout, teacher_bytes, worker_bytes

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


def test_memory_is_sixteen_bytes_a_parameter_and_the_activations_and_a_teacher_is_cut_by_its_gpus(tmp_path):
    Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=100, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    config = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], [f"teacher.model={tmp_path}", "teacher.dtype=auto"])
    assert worker_bytes(config, 1000, 10) == 16_000 + 32_768 * 10 * 2
    whole = teacher_bytes(config, 1)
    assert teacher_bytes(config, 4) == whole / 4
    in_float = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], [f"teacher.model={tmp_path}", "teacher.dtype=float32"])
    assert teacher_bytes(in_float, 1) == 2 * whole
