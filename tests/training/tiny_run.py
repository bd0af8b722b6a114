"""A tiny student and rows for it: no tokenizer of the demo world, no teacher, no Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raykd.config import Config
from raykd.data.examples import examples_to_table
from raykd.data.pairs import begins_row, numbered, rejected_half
from raykd.training.feed import Feed
from raykd.training.loop import fit
from raykd.training.ranks import Ranks
from raykd.training.trainer import Trainer, make_trainer
from raykd.types import EXAMPLE_SCHEMA, Example, Mark, Source

VOCAB = 64
TOP_K = 4
PAIR_MARKS = (Mark.CODE_MODE, Mark.DIRECT_TOOL)


def save_student(path: Path) -> None:
    """A random 2-layer Qwen3 with tied embeddings and 64 words."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")), pad_token="w0"
    )
    words.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)


def make_config(student_path: Path, **sections) -> Config:
    """Config of a small run; keyword arguments such as `train`, `loss`, `student` are merged in."""
    values: dict = {
        "teacher": {"kind": "hf", "model": str(student_path)},
        "student": {"model": str(student_path)},
        "data": {"prompts": "none"},
        "loss": {"kd": 1.0, "ce_teacher": 0.5, "tool_name": 0.25},
        "train": {"sequences_per_step": 8, "learning_rate": 1e-2, "log_every": 1, "weight_decay": 0.1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return Config.model_validate(values)


def make_rows(num_rows: int, *, seed: int = 0, held_out: bool = False, lengths: tuple[int, int] = (4, 12)) -> pa.Table:
    """Random sequences with random teacher scores; uids count up from 1000 * seed."""
    random = np.random.default_rng(seed)
    rows = []
    for row in range(num_rows):
        length = int(random.integers(*lengths, endpoint=True))
        marks = np.zeros(length, np.uint16)
        marks[2:] = Mark.RESPONSE
        marks[2 + row % 2 :: 3] |= np.uint16(Mark.TOOL_NAME)
        logits = np.sort(random.normal(size=(length - 2, TOP_K + 1)))[:, ::-1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows.append(
            {
                "uid": 1000 * seed + row,
                "held_out": held_out,
                "source": int(Source.TEACHER),
                "input_ids": random.integers(0, VOCAB, length),
                "marks": marks,
                "topk_ids": np.concatenate([random.permutation(VOCAB)[:TOP_K] for _ in range(length - 2)]),
                "topk_logprobs": logprobs[:, :TOP_K].astype(np.float16).ravel(),
                "log_tail": logprobs[:, TOP_K],
                "top_k": TOP_K,
                "teacher_id": "random",
                "num_calls": 0,
                "num_truncated_calls": 0,
                "pair": 0,
                "caws_tier": 0,
                "num_teacher_layers": 0,
                "missing": "" if row % 2 else "tool_choice:few_tools copy_mass:no_tool_result",
                "tool_name_weight": 1.0,
                "teacher_seconds": 0.1,
                "teacher_wait_seconds": 0.0,
            }
        )
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def make_pairs(num_pairs: int, *, seed: int = 0, first_uid: int | None = None) -> pa.Table:
    """Two random responses to each of some random prompts, code preferred to direct calls; uids count from 1000 * seed."""
    first_uid = 1000 * seed if first_uid is None else first_uid
    random = np.random.default_rng(seed)
    examples = []
    for row in range(num_pairs):
        prompt = random.integers(0, VOCAB, 3)
        preferred, other = (_written(prompt, random.integers(0, VOCAB, random.integers(2, 9)), mark) for mark in PAIR_MARKS)
        examples += numbered((preferred, rejected_half(other)), first_uid + row)
    return examples_to_table(examples)


def _written(prompt: np.ndarray, response: np.ndarray, mark: Mark) -> Example:
    return Example(
        uid=0,
        source=Source.GOLD,
        input_ids=np.concatenate([prompt, response]).astype(np.int32),
        marks=np.repeat([0, Mark.RESPONSE | mark], [len(prompt), len(response)]).astype(np.uint16),
        topk_ids=np.empty((len(response), 0), np.int32),
        topk_logprobs=np.empty((len(response), 0), np.float16),
        log_tail=np.empty(0, np.float32),
    )


def make_feed(trainer: Trainer, tables: list[pa.Table]) -> Feed:
    """A feed of this rank's share, from tables that are already there."""
    train = trainer.config.train
    return Feed(iter(tables), trainer.ranks.share(train.sequences_per_step), train.max_tokens_per_micro_batch, pad_id=0)


def run(
    config: Config,
    folder: Path,
    tables: list[pa.Table],
    *,
    ranks: Ranks | None = None,
    num_steps: int = 10,
    stop: Callable[[], bool] = lambda: False,
    save_now: Callable[[], bool] = lambda: False,
    **options: Any,
) -> tuple[Trainer, list[tuple[int, dict[str, float]]]]:
    """Train from the newest checkpoint in `folder` on the rows that its ledger lacks; returns what was logged, too.

    Further `options` are those of `make_trainer`.
    """
    facts = {"num_steps": num_steps, "teacher": {"fingerprint": "f"}, "ranks": ranks or Ranks()}
    trainer = make_trainer(config, folder, **facts, **options)
    left = [table.filter(pa.array(~np.isin(_row_uids(table), trainer.consumed))) for table in tables]
    logged: list[tuple[int, dict[str, float]]] = []
    fit(
        trainer,
        make_feed(trainer, left),
        log=lambda step, metrics: logged.append((step, dict(metrics))),
        stop=stop,
        save_now=save_now,
        before_step=lambda step: None,
    )
    return trainer, logged


def _row_uids(table: pa.Table) -> np.ndarray:
    """Uid of the row that each example is of; the halves of a pair are of one."""
    first = np.maximum.accumulate(np.where(begins_row(table), np.arange(len(table)), 0))
    return table["uid"].to_numpy()[first]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}


def run_on_two_ranks(
    config: Config, folder: Path, tables: list[list[pa.Table]], device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], list[tuple[int, dict[str, float]]]]:
    """`run` in two processes, each with its own tables; returns the weights and what rank 0 logged."""
    folder.mkdir()
    torch.multiprocessing.spawn(_run_rank, (config, folder, tables, device), nprocs=2)
    logged = json.loads((folder / "logged.json").read_text())
    return torch.load(folder / "weights.pt"), [(step, metrics) for step, metrics in logged]


def _run_rank(rank: int, config: Config, folder: Path, tables: list[list[pa.Table]], device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    trainer, logged = run(config, folder, tables[rank], ranks=Ranks.of_process_group(), device=torch.device(device))
    if rank == 0:
        torch.save(weights(trainer), folder / "weights.pt")
        (folder / "logged.json").write_text(json.dumps(logged))
    dist.destroy_process_group()
