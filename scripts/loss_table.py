"""What every loss does: its value, gradient and count on one batch, what 100 steps with it alone change, what all cost.

In:  configs/demo.yaml and configs/demo_all.yaml, the demo world. Out: bench/losses.md (Markdown) and bench/losses.json.

    python scripts/loss_table.py [--steps 100] [--prompts 80] [--only kd halt …]

All starts are the same: the demo student after some steps of kd, so that there is something to lose. Half of the rows are
the teacher's answers with its hidden states, half hold their responses (raykd/demo/offline.py). One process, no Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raykd.cli import load_config
from raykd.config import Config
from raykd.data.curriculum import Curriculum
from raykd.data.examples import Wanted, build_examples, example_from_row, examples_to_table
from raykd.data.offline_rows import RowReader
from raykd.data.pairs import begins_row, numbered
from raykd.data.text_scores import judge
from raykd.demo.corpus import generate as generate_prompts
from raykd.demo.grade import grade_texts
from raykd.demo.offline import generate_rows
from raykd.demo.tokenizer import render
from raykd.loss_config import LOSSES
from raykd.student.generation import generate
from raykd.student.model import student_config
from raykd.training.feed import Feed
from raykd.training.loop import count_tokens, fit, step, validate
from raykd.training.loss_context import make_context
from raykd.training.reference import with_reference
from raykd.training.rollouts import KeptRollouts, RolloutRows, rollout_examples
from raykd.training.trainer import Trainer, make_trainer
from raykd.types import Batch
from raykd.vocabulary import student_tokenizer
from teacher_serving.connect import connect

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench"
METRICS = {
    "kd": ("KL to the teacher, nats", "teacher_kl"),
    "tool_name": ("share of name tokens right", "accuracy/tool_name"),
    "json_argument": ("share of argument tokens right", "accuracy/json_argument"),
    "code_mode_preference": ("log-probability of code less that of calls", "code_less_calls"),
    "length_aware": ("tokens of its own answers", "rollout_length"),
    "policy_gradient": ("reward of its own answers", "reward"),
}
"""What shows the effect of a loss, in words and as a held-out metric; of the others it is the held-out loss itself."""
NOTES = {
    "caws_compliance": "nothing to forbid: a student that has hardly seen <bot> gives it no mass",
    "self_kd": "0: the student is what it is compared with, until INT8 or another loss moves it",
}
"""Why the metric of a loss hardly moves, where it does not."""


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    loss: str
    value: float  # on the fixed batch, nats (or what the loss is in)
    gradient_norm: float
    count: float
    metric: str
    before: float
    after: float
    exact_before: float
    exact_after: float


@dataclass(frozen=True)
class World:
    """Rows and prompts that all runs share."""

    train: pa.Table  # EXAMPLE_SCHEMA, teacher's answers and offline rows in turn
    held_out: pa.Table
    prompts: list[dict[str, Any]]  # held-out prompts whose answer is a call, with gold fields
    prompt_ids: list[np.ndarray]
    eos_ids: tuple[int, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps with one loss alone")
    parser.add_argument("--warm-steps", type=int, default=450, help="steps of kd before")
    parser.add_argument("--prompts", type=int, default=80, help="held-out prompts for the exact-call rate")
    parser.add_argument("--rows", type=int, default=600, help="training rows of either kind")
    parser.add_argument("--only", nargs="*", choices=LOSSES, default=LOSSES)
    args = parser.parse_args()
    torch.set_num_threads(2)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base = base_config(Path(folder))
        world = make_world(base, args.rows, args.prompts)
        warm, exact = warm_up(base, world, Path(folder), args.warm_steps)
        rows = [measure(warm, name, world, Path(folder), args.steps, exact) for name in args.only]
        cost = measure_cost(warm, world, Path(folder))
    OUT.mkdir(exist_ok=True)
    text = table(rows, cost, args.steps)
    print(text)
    (OUT / "losses.md").write_text(text, encoding="utf-8")
    (OUT / "losses.json").write_text(json.dumps({"rows": [asdict(row) for row in rows], "cost": cost}, indent=1))
    return 0


def base_config(folder: Path) -> Config:
    """The demo with everything on, its teacher in plain transformers."""
    files = [ROOT / "configs" / "demo.yaml", ROOT / "configs" / "demo_all.yaml"]
    config = load_config(files, [f"run.dir={folder}", "train.schedule=constant", "train.warmup_steps=20"])
    teacher = config.teacher.model_dump(mode="json")
    kept = ("model", "top_k", "max_model_len", "sampling", "hidden_layers", "dtype", "max_num_seqs")
    return changed(config, teacher={name: teacher[name] for name in kept} | {"kind": "hf", "device": "cpu"})


def changed(config: Config, **sections: Any) -> Config:
    """The config with some sections in place of its own."""
    return Config.model_validate(config.model_dump(mode="json") | sections)


def make_world(config: Config, num_rows: int, num_prompts: int) -> World:
    """Answers of the teacher and rows of the demo world, for training and held out."""
    teacher = connect(config.teacher)
    tokenizer = AutoTokenizer.from_pretrained(config.teacher.tokenizer_folder)
    wanted = Wanted.by(config, tokenizer)
    curriculum = Curriculum.of(config, student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens))
    assert curriculum is not None, "demo_all has a latent curriculum"
    reader = RowReader(tokenizer, config.teacher.top_k, wanted=wanted)

    def ids_of(row: dict[str, Any]) -> np.ndarray:
        return np.array(tokenizer(render(tokenizer, row, prompt=True), add_special_tokens=False)["input_ids"], np.int32)

    def rows_of(split: str, number: int) -> pa.Table:
        prompts = list(generate_prompts(number, 7, split))
        asked = {
            "uid": pa.array(range(number), pa.int64()),
            "prompt_ids": pa.array(map(ids_of, prompts), pa.list_(pa.int32())),
        }
        answered = teacher.generate(pa.table(asked))
        for name, key in (("messages_json", "messages"), ("tools_json", "tools")):
            answered = answered.append_column(name, pa.array([json.dumps(prompt[key]) for prompt in prompts]))
        built = build_examples(answered, tokenizer, wanted)
        assert not built.rejected.num_rows, built.rejected.to_pylist()
        live = [(example_from_row(built.examples, index),) for index in range(number)]
        offline = []
        for index, read in enumerate(reader.examples(list(generate_rows(number, 7, split)))):
            assert not isinstance(read, str), read
            offline.append(numbered(read, number + index))
        mixed = [example for pair in zip(live, offline, strict=False) for row in pair for example in row]
        return curriculum.apply(examples_to_table(mixed), [10**9] * len(mixed))

    prompts = [row for row in generate_prompts(3 * num_prompts, 11, "held_out") if row["gold_calls"]][:num_prompts]
    world = World(
        rows_of("train", num_rows), rows_of("held_out", 96), prompts, [ids_of(row) for row in prompts],
        teacher.info.eos_token_ids,
    )  # fmt: skip
    teacher.close()
    return world


def alone(config: Config, name: str) -> Config:
    """The config with one loss, and only what that loss needs."""
    options = config.loss.model_dump(mode="json") | dict.fromkeys(LOSSES, 0.0) | {name: 1.0}
    needs_rollouts = name in ("policy_gradient", "length_aware")
    return changed(
        config,
        loss=options,
        latent={"stages": []},
        rollouts=config.rollouts.model_dump(mode="json") if needs_rollouts else {},
    )


def trainer_of(config: Config, folder: str, num_steps: int) -> Trainer:
    tokenizer = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
    context, projections = make_context(config, tokenizer, student_config(config.student))
    run_folder = Path(tempfile.mkdtemp(dir=folder))
    return make_trainer(config, run_folder, num_steps=num_steps, teacher={}, context=context, projections=projections)


def endless(table: pa.Table, seed: int) -> Iterator[pa.Table]:
    """The rows again and again, pairs together, each pass under uids of its own."""
    rng = np.random.default_rng(seed)
    examples = [example_from_row(table, index) for index in range(table.num_rows)]
    starts = np.flatnonzero(begins_row(table)).tolist()
    rows = [tuple(examples[start:stop]) for start, stop in zip(starts, [*starts[1:], len(examples)], strict=True)]
    for number in itertools.count():
        for index in rng.permutation(len(rows)).tolist():
            yield examples_to_table(numbered(rows[index], number * len(rows) + index))


def feed_of(trainer: Trainer, world: World) -> Feed:
    train = trainer.config.train
    rows = endless(world.train, trainer.config.run.seed)
    return Feed(rows, train.sequences_per_step, train.max_tokens_per_micro_batch, pad_id=0)


def run(trainer: Trainer, feed: Feed, world: World, num_steps: int) -> None:
    """Train `num_steps` steps."""
    rollouts = KeptRollouts(
        trainer.config.rollouts.every, lambda table, number: sampled(trainer, feed, world, table, number)
    )
    fit(
        trainer, feed, log=lambda number, metrics: None, stop=lambda: trainer.progress.step >= num_steps,
        before_step=lambda number: None, rollouts=rollouts if trainer.config.rollouts.prompts_per_step else None,
    )  # fmt: skip


def sampled(trainer: Trainer, feed: Feed, world: World, table: pa.Table, seed: int) -> RolloutRows:
    """The student's own answers to some prompts of a step, as training has them."""
    options = trainer.config.rollouts
    examples = [example_from_row(table, index) for index in range(table.num_rows)]
    examples = [example for example in examples if example.pair >= 0 and example.teacher_id][: options.prompts_per_step]
    made = rollout_examples(
        examples,
        trainer.student.tokenizer,
        options,
        sample=lambda prompts: generate(
            trainer.student, prompts, max_tokens=options.max_tokens, temperature=options.temperature, seed=seed,
            eos_ids=world.eos_ids,
        ),
        score=lambda texts, teachers, tiers: judge(
            texts, teachers, [tier or trainer.config.loss.caws_tier for tier in tiers], caws=options.caws,
            claims=options.claims,
        ),
        eos_ids=world.eos_ids,
    )  # fmt: skip
    numbers = {"reward": made.rewards.sum(), "rollouts": made.rewards.size, "rollout_tokens": made.lengths.sum()}
    return RolloutRows(feed.batches(examples_to_table(made.examples)), {name: float(n) for name, n in numbers.items()})


def warm_up(config: Config, world: World, folder: Path, num_steps: int) -> tuple[Config, float]:
    """Train the demo student with kd; returns a config that starts from it, and its share of exact calls."""
    trainer = trainer_of(alone(config, "kd"), str(folder), num_steps)
    run(trainer, feed_of(trainer, world), world, num_steps)
    target = folder / "warm"
    trainer.student.save(target)
    exact = exact_calls(trainer, world)
    print(f"the student after {num_steps} steps of kd: {exact:.3f} exact calls", flush=True)
    train = config.train.model_dump(mode="json") | {"learning_rate": 5e-4}
    return changed(config, student={"model": str(target)}, train=train), exact


def exact_calls(trainer: Trainer, world: World) -> float:
    """Share of the prompts that the student, writing greedily, answers with exactly the gold calls."""
    answers = generate(trainer.student, world.prompt_ids, max_tokens=128, temperature=0.0, seed=0, eos_ids=world.eos_ids)
    texts = trainer.student.tokenizer.batch_decode([answer.ids.tolist() for answer in answers], skip_special_tokens=True)
    return grade_texts(world.prompts, texts).exact


def fixed_batches(trainer: Trainer, feed: Feed, world: World, rows: pa.Table | None = None) -> list[Batch]:
    """160 rows of both kinds (or the given ones), with the student's own answers to some where the loss looks at them."""
    rows = world.train.slice(0, 160) if rows is None else rows  # so many that every loss has something to look at
    batches = feed.batches(rows)
    if trainer.config.rollouts.prompts_per_step:
        batches += sampled(asking_more(trainer, 24), feed, world, rows, 0).batches
    return batches if trainer.reference is None else with_reference(trainer.reference, batches, trainer.autocast())


def asking_more(trainer: Trainer, num_prompts: int) -> Trainer:
    """The trainer with so many prompts to answer: of few, all answers may earn the same."""
    options = trainer.config.rollouts.model_copy(update={"prompts_per_step": num_prompts})
    return replace(trainer, config=trainer.config.model_copy(update={"rollouts": options}))


def one_step(trainer: Trainer, batches: Sequence[Batch]) -> dict[str, float]:
    """Make a step over these batches; its metrics, the norm of the gradient before it was clipped among them."""
    losses = trainer.losses_now()
    sums = count_tokens(list(batches), losses, trainer.context) | trainer.loss_state.measure(batches, losses)
    agreed = trainer.ranks.sum(sums)
    trainer.loss_state = trainer.loss_state.updated(agreed, losses)
    step(trainer, list(batches), agreed, losses)
    metrics = trainer.meters.read(trainer.ranks, losses.terms)
    trainer.meters.clear()
    return metrics


def measure(config: Config, name: str, world: World, folder: Path, num_steps: int, exact_before: float) -> Measured:
    """One loss alone."""
    config = alone(config, name)
    probe = trainer_of(config, str(folder), num_steps)
    once = one_step(probe, fixed_batches(probe, feed_of(probe, world), world))

    trainer = trainer_of(config, str(folder), num_steps)
    trainer.loss_state = probe.loss_state  # scales and frequencies, measured once
    feed = feed_of(trainer, world)
    words, key = METRICS.get(name, ("the loss on held-out rows", "loss/total"))
    before = held_out_metrics(trainer, feed, world)
    run(trainer, feed, world, num_steps)
    after, exact_after = held_out_metrics(trainer, feed, world), exact_calls(trainer, world)
    count = sum(once[f"count/{term}"] for term in config.loss.terms)
    row = Measured(
        name, once["loss/total"], once["grad_norm"], count, words, before[key], after[key],
        exact_before, exact_after,
    )  # fmt: skip
    print(row, flush=True)
    return row


def held_out_metrics(trainer: Trainer, feed: Feed, world: World) -> dict[str, float]:
    """Losses and metrics on held-out rows; with rollouts also the mean reward of answers to held-out prompts."""
    feed.held_out = [world.held_out]
    metrics = validate(trainer, feed)
    feed.held_out = []
    if "code_mode_preference" in trainer.config.loss.weights:
        metrics["code_less_calls"] = metrics["code_mode_logprob"] - metrics["direct_tool_logprob"]
    if trainer.config.rollouts.prompts_per_step:
        numbers = sampled(asking_more(trainer, 48), feed, world, world.held_out, seed=0).numbers
        metrics["reward"] = numbers["reward"] / numbers["rollouts"]
        metrics["rollout_length"] = numbers["rollout_tokens"] / numbers["rollouts"]
    return metrics


def measure_cost(config: Config, world: World, folder: Path, repeats: int = 40) -> dict[str, Any]:
    """CPU time of a step with all losses over that of a step with kd alone, in turn.

    `own_rows`: both on the rows that kd has. `same_rows`: both also on the rows that only other losses look at, the
    rejected halves of pairs and the student's own answers. `whole_step`: kd on its rows, all on theirs, with the
    reference's opinion of pairs and the sampling of answers, once in `rollouts.every` steps.
    """
    kd_alone, every_loss = (trainer_of(made, str(folder), repeats) for made in (alone(config, "kd"), config))
    reference = every_loss.reference
    assert reference is not None, "demo_all has pairs"
    seconds: dict[str, list[float]] = {
        name: [] for name in ("kd", "all_own_rows", "kd_same_rows", "all", "reference", "sampling")
    }

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[name].append(time.process_time() - start)

    feed, rows_per_step = feed_of(every_loss, world), 2 * config.train.sequences_per_step
    torch.set_num_threads(1)
    for number in range(repeats):
        rows = world.train.slice(number % 8 * rows_per_step, rows_per_step)
        own, batches = feed.batches(rows.filter(pa.array(begins_row(rows)))), feed.batches(rows)
        with timed("reference"):
            batches = with_reference(reference, batches, every_loss.autocast())
        with timed("sampling"):
            batches = batches + sampled(every_loss, feed, world, rows, number).batches
        for name, trainer, given in (
            ("kd", kd_alone, own),
            ("all_own_rows", every_loss, own),
            ("kd_same_rows", kd_alone, batches),
            ("all", every_loss, batches),
        ):
            with timed(name):
                one_step(trainer, given)
    ms = {name: 1e3 * np.array(values[2:]) for name, values in seconds.items()}
    whole = ms["all"] + ms["reference"] + ms["sampling"].mean() / config.rollouts.every
    return {
        "losses": sorted(config.loss.weights),
        "own_rows": float(np.median(ms["all_own_rows"] / ms["kd"])),
        "same_rows": float(np.median(ms["all"] / ms["kd_same_rows"])),
        "whole_step": float(np.median(whole / ms["kd"])),
        "cpu_ms": {name: float(np.median(values)) for name, values in ms.items()},
    }


def table(rows: Sequence[Measured], cost: Mapping[str, Any], num_steps: int) -> str:
    """The Markdown of the table."""
    lines = [
        f"| loss | on one batch | gradient norm | count | its metric | before | after {num_steps} steps | exact calls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        note = f" ({NOTES[row.loss]})" if row.loss in NOTES else ""
        lines.append(
            f"| {row.loss} | {row.value:.4f} | {row.gradient_norm:.3g} | {row.count:g} | {row.metric}{note} | "
            f"{row.before:.4f} | {row.after:.4f} | {row.exact_before:.2f} → {row.exact_after:.2f} |"
        )
    ms = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in cost["cpu_ms"].items())
    lines += [
        "",
        f"A step with all {len(cost['losses'])} losses takes {cost['own_rows']:.3f} times the CPU time of kd alone on kd's "
        f"rows, {cost['same_rows']:.3f} times where both have the rejected halves of pairs and the student's answers too, "
        f"{cost['whole_step']:.2f} times with making these rows and the reference's opinion (medians in ms: {ms}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
