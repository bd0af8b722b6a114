"""Real agent conversations through the whole pipeline: recorded turns, scored by a live vLLM teacher, trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd.data.examples import build_examples, decode_spans, example_from_row
from raykd.tracing import read_metrics
from raykd.train import main
from raykd.training.checkpoint import latest_checkpoint, read_ledger
from raykd.types import Mark
from tests.conftest import SHARED_DATA, save_tiny_model

CONTEXT = 16_384
FILES = {"bfcl_tool_calls.jsonl": 48, "tau_airline_trajectories.jsonl": 4}

CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Where is order 4711-X?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "find_order", "arguments": '{"order": "4711-X"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": '{"city": "Köln", "arrives": "2024-05-15", "price": 1234.5}'},
        {"role": "assistant", "content": "It is in Köln, arrives on May 15, 2024 and costs 1,234.50."},
    ]
}


def recorded_calls(row: dict) -> list[str]:
    """Names of the calls a row records."""
    made = [call["function"]["name"] for message in row["messages"] for call in message.get("tool_calls") or ()]
    return made or [call["name"] for call in row.get("gold_calls", ())]


@pytest.fixture(scope="module")
def rows_of_both(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Some rows of each file, where the data is there, and one written here."""
    rows = [CONVERSATION | {"id": "written here"}]
    for name, count in FILES.items():
        if (SHARED_DATA / name).exists():
            with (SHARED_DATA / name).open(encoding="utf-8") as file:
                rows += [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    path = tmp_path_factory.mktemp("real") / "recorded.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path, rows


@pytest.mark.ray
@pytest.mark.vllm
def test_recorded_conversations_are_scored_trained_on_and_every_call_has_its_spans(
    rows_of_both, tmp_path, demo_tokenizer, ray_cluster
):
    path, rows = rows_of_both
    teacher = save_tiny_model(tmp_path / "teacher", demo_tokenizer, seed=0, max_positions=CONTEXT)
    student = save_tiny_model(tmp_path / "student", demo_tokenizer, seed=1, num_layers=1, max_positions=CONTEXT)
    overrides = [
        f"run.dir={tmp_path / 'runs'}",
        f"teacher={{kind: vllm, model: '{teacher}', dtype: float32, top_k: 16, max_num_seqs: 4, batch_size: 4}}",
        f"student.model={student}",
        f"data={{prompts: '{path}', completions: recorded}}",
        "loss={kd: 1, ce_truth: 1, tool_name: 1, json_argument: 1, integration_copy: 1}",
        "train={sequences_per_step: 16, max_tokens_per_micro_batch: 4096, log_every: 1}",
        "tracking={tensorboard: false, progress_bar: false}",
    ]
    config_file = tmp_path / "empty.yaml"
    config_file.write_text("")
    assert main(["--config", str(config_file), *overrides]) == 0

    run = tmp_path / "runs" / "run"
    assert (run / "rejected.jsonl").read_text() == ""
    assert len(read_ledger(latest_checkpoint(run))) == len(rows)
    entry = next(entry for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry)
    for name in ("kd", "ce_truth", "tool_name", "json_argument", "integration_copy"):
        assert entry[f"count/{name}"] > 0, f"{name} supervised nothing"

    # What the teacher scored, put beside its prompts once more: every recorded call is found, by its name as it is decoded.
    prompts = read(run / "prompts", "train-*.parquet")
    answers = read(run / "teacher_cache", "*.parquet").drop_columns(["uid", "prompt_ids"])
    for name in answers.column_names:
        prompts = prompts.append_column(name, answers[name])
    examples, rejected = build_examples(prompts, demo_tokenizer)
    assert rejected.num_rows == 0
    names = {row["id"]: recorded_calls(row) for row in rows}
    for index, key in enumerate(prompts["key"].to_pylist()):
        assert decode_spans(example_from_row(examples, index), demo_tokenizer)[Mark.TOOL_NAME] == names[key]


def read(folder: Path, pattern: str) -> pa.Table:
    """All rows of a folder's Parquet files, by uid."""
    return pa.concat_tables([pq.read_table(file) for file in folder.rglob(pattern)]).sort_by("uid")
