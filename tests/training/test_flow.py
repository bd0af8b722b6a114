"""raykd/training/flow.py: how many teachers feed how many workers, and what passes between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from raykd.cli import load_config
from raykd.config import Config
from raykd.training.flow import balanced, engines_for, flow_panels, sequence_of

CONFIGS = Path(__file__).parents[2] / "configs"
RATES = (
    "rates={teacher_tokens_per_s: 1000, worker_tokens_per_s: 4400, prompt_tokens: 1000, response_tokens: 100}",
    "teacher.top_k=64",
)


def config_of(recipe: str, *overrides: str) -> Config:
    return load_config([CONFIGS / f"{recipe}.yaml"], [*RATES, *overrides])


def test_an_engine_writes_completions_and_a_worker_reads_prompts_too():
    sequence = sequence_of(config_of("qwen3_8b_to_0.6b"))
    assert (sequence.per_engine, sequence.per_worker) == (10.0, 4.0)
    assert sequence.answer_bytes == 100 * (6 * 64 + 12) + 1000 * 4
    assert sequence.example_bytes == 100 * (6 * 64 + 4) + 1100 * 6
    assert [engines_for(config_of("qwen3_8b_to_0.6b"), workers) for workers in (1, 2, 3, 5, 16)] == [1, 1, 2, 2, 7]


@pytest.mark.parametrize(
    ("recipe", "num_gpus", "workers", "teachers"),
    [
        ("qwen3_8b_to_0.6b", 8, 6, 2),  # 20 sequences a second; three teachers before five workers make no more
        ("qwen3_8b_to_0.6b", 64, 46, 18),  # 180; 19 and 45 too
        ("qwen3_8b_to_0.6b", 1, 0, 1),
        ("qwen3_32b_to_1.7b", 8, 4, 1),
        ("qwen3_32b_to_1.7b", 64, 24, 10),  # four GPUs for each: 96 of the 100 that the teachers could write
    ],
)
def test_gpus_are_shared_out_so_that_neither_side_waits(recipe, num_gpus, workers, teachers):
    found = balanced(config_of(recipe), num_gpus)
    assert (found.workers, found.teachers) == (workers, teachers)


def test_the_panel_says_how_many_engines_are_needed_and_there_is_none_without_a_teacher():
    console = Console(width=160, record=True)
    console.print(*flow_panels(config_of("qwen3_8b_to_0.6b")))
    text = " ".join(console.export_text().split())
    assert "engines that feed 2 workers: 1; the config has 6" in text
    for row in ("8 6 2 x 1 20 1.78 0.151 3.14", "64 46 18 x 1 180 16 0.178 28.3"):
        assert row in text
    offline = ["data.prompts=null", "data.held_out=null", "data.offline=[{path: rows.jsonl}]", "data.length_stages=[]"]
    assert flow_panels(config_of("qwen3_8b_to_0.6b", *offline)) == []
