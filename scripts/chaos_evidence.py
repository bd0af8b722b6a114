"""What shows that every prompt of a run went into its weights exactly once, from the files of the run alone.

In:  the folder of a run that is over, and of one in which nothing died. Out: prompts lost and repeated; what else is amiss.

The last checkpoint's ledger has every training prompt once; the steps in metrics.jsonl, superseded ones left out, took as
many sequences as there are prompts and as many tokens as the teacher's cached answers to them have; and where the order is
fixed (one worker) losses and weights are those of the run in which nothing died.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.torch import load_file

from raykd.data.sources import PromptSet
from raykd.tracing import read_metrics
from raykd.training.checkpoint import latest_checkpoint, read_ledger, read_state


@dataclass(frozen=True)
class Evidence:
    """`problems`: empty where all is as it must be."""

    lost: int
    repeated: int
    problems: list[str]


def judge(run: Path, undisturbed: Path | None) -> Evidence:
    """Prompts lost and repeated, and every problem, of the run in a folder; `undisturbed`: one that it must equal."""
    wanted, checkpoint = train_uids(run), latest_checkpoint(run)
    if checkpoint is None:
        return Evidence(len(wanted), 0, ["no checkpoint"])
    ledger, state = read_ledger(checkpoint), read_state(checkpoint)
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry]
    trained = int(entries[-1]["sequences"]) if entries else 0
    lost = len(np.setdiff1d(wanted, ledger))
    repeated = len(ledger) - len(np.unique(ledger)) + max(0, trained - len(wanted))
    problems = []
    if lost or repeated or len(np.setdiff1d(ledger, wanted)):
        problems.append(f"{lost} prompts lost, {repeated} repeated")
    if state["sequences"] != len(wanted) or state["response_tokens"] != answer_tokens(run, wanted):
        problems.append(
            f"{state['sequences']} sequences with {state['response_tokens']} tokens went into steps; the teacher's answers "
            f"to {len(wanted)} prompts have {answer_tokens(run, wanted)}"
        )
    if undisturbed is not None:
        problems.extend(differences(run, undisturbed))
    return Evidence(lost, repeated, problems)


def train_uids(folder: Path) -> np.ndarray:
    """Sorted uids of the prompts to train on."""
    prompts = PromptSet(**json.loads((folder / "prompts" / "prompt_set.json").read_text())["prompt_set"])
    return np.sort(prompts.index()["uid"].to_numpy())


def answer_tokens(folder: Path, uids: np.ndarray) -> int:
    """Tokens of the cached answers to these prompts, each once."""
    lengths: dict[int, int] = {}
    for file in (folder / "teacher_cache").rglob("*.parquet"):
        table = pq.read_table(file, columns=["uid", "output_ids"])
        lengths |= {
            uid: len(ids) for uid, ids in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        }
    return sum(lengths[uid] for uid in uids.tolist() if uid in lengths)


def differences(run: Path, undisturbed: Path) -> Iterator[str]:
    """In what the losses of the steps and the last weights differ from those of a run in which nothing died."""
    losses = [[entry["loss/total"] for entry in read_metrics(each / "metrics.jsonl")] for each in (run, undisturbed)]
    if len(losses[0]) != len(losses[1]) or not np.allclose(*losses, rtol=1e-3):
        yield "losses differ from those of the undisturbed run"
    checkpoints = [latest_checkpoint(each) for each in (run, undisturbed)]
    first, second = (load_file(path / "student" / "model.safetensors") for path in checkpoints if path)
    if (most := max((first[name] - second[name]).abs().max().item() for name in second)) > 1e-4:
        yield f"weights differ from those of the undisturbed run by {most:.1g}"
