"""raykd/training/sizing.py: the arithmetic of clusters that nobody has at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from raykd.cli import load_config
from raykd.student.model import count_gathered_parameters, count_parameters
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


def test_the_memory_of_a_teacher_is_cut_by_its_gpus(tmp_path):
    Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=100, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    config = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], [f"teacher.model={tmp_path}", "teacher.dtype=auto"])
    whole = teacher_bytes(config, 1)
    assert teacher_bytes(config, 4) == whole / 4
    in_float = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], [f"teacher.model={tmp_path}", "teacher.dtype=float32"])
    assert teacher_bytes(in_float, 1) == 2 * whole


def test_sixteen_bytes_a_parameter_and_the_activations_or_a_share_and_what_is_in_whole_at_a_time():
    architecture = Qwen3Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        vocab_size=100, tie_word_embeddings=True,
    )  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8 + 2 * 4  # q, k and v, o, MLP, norms, norms of q and k
    size = count_parameters(architecture), count_gathered_parameters(architecture)
    assert size == (100 * 8 + 8 + 3 * layer, 100 * 8 + 8 + 2 * layer)
    ddp = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"])
    fsdp = load_config([CONFIGS / "qwen3_8b_to_0.6b.yaml"], ["train.parallel_strategy=fsdp"])
    activations = 32_768 * 10 * 2
    head = 10 * 4 * 4 + 32_768 * 10 * 2 + 512 * 10 * 4  # its gradient; the logits' gradient, and some rows of logits
    size = StudentSize(1000, 100, vocab_size=10, hidden_size=4)
    for reference, of_ddp, of_fsdp in ((False, 18_000, 4_800), (True, 22_000, 4_800 + 1_400)):
        assert worker_bytes(ddp, size, 10, 4, reference=reference) == of_ddp + activations + head
        assert worker_bytes(fsdp, size, 10, 4, reference=reference) == of_fsdp + activations + head
        assert worker_bytes(fsdp, size, 10, 1, reference=reference) == of_ddp + activations + head


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
    size = StudentSize(1_720_574_976, 1_720_574_976, architecture.vocab_size, architecture.hidden_size)
    planned = worker_bytes(config, size, activations_per_token(config, architecture), 1) / 2**30
    assert planned == pytest.approx(measured, rel=0.1)
