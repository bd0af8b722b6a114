"""The student's own answers in a run: sampled from a step's prompts, scored in Ray tasks, batched for the step.

In:  a Trainer, and the rows of its Feed. Out: `KeptRollouts`, which `loop.fit` asks for micro-batches beside a step's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raykd.config import Config
from raykd.data.examples import example_from_row, examples_to_table
from raykd.data.pairs import begins_row
from raykd.data.text_scores import Judged, judge
from raykd.student.generation import Generated, generate
from raykd.training.feed import Feed
from raykd.training.rollouts import KeptRollouts, RolloutRows, Score, rollout_examples
from raykd.training.trainer import Trainer


def rollouts_of(trainer: Trainer, feed: Feed, eos_ids: list[int]) -> KeptRollouts:
    """What samples, scores and batches the student's own answers to some prompts of a step (this rank's share of them).

    `eos_ids`: the student's ids that end an answer.
    """
    config, ranks, score = trainer.config, trainer.ranks, score_in_ray(trainer.config)
    options = config.rollouts
    share = ranks.share(options.prompts_per_step)

    def sample_rows(table: pa.Table, step: int) -> RolloutRows:
        table = table.filter(pa.array(begins_row(table)))  # a prompt once, beside the response to follow
        examples = [example_from_row(table, index) for index in range(min(share, table.num_rows))]
        seed = hash((config.run.seed, step, ranks.rank)) % 2**63

        def sample(prompts: list[np.ndarray]) -> list[Generated]:
            with trainer.whole_student(), trainer.autocast():  # sampled from what is trained
                return generate(
                    trainer.student,
                    prompts,
                    max_tokens=options.max_tokens,
                    temperature=options.temperature,
                    seed=seed,
                    eos_ids=eos_ids,
                )

        made = rollout_examples(examples, trainer.student.tokenizer, options, sample=sample, score=score, eos_ids=eos_ids)
        numbers = {"rollouts": made.rewards.size, "reward": made.rewards.sum(), "rollout_tokens": made.lengths.sum()}
        return RolloutRows(
            feed.batches(examples_to_table(made.examples)), {name: float(value) for name, value in numbers.items()}
        )

    return KeptRollouts(options.every, sample_rows)


def score_in_ray(config: Config, num_tasks: int = 4) -> Score:
    """What judges sampled responses (data/text_scores.py) in that many Ray tasks, on any CPU of the cluster.

    The tasks ask for no logical CPU: the stream's actors may hold all of them, and wait for this step in their turn.
    """
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # pyright: ignore[reportArgumentType]: none of ours
    remote: Any = ray.remote(num_cpus=0, scheduling_strategy=outside)  # its stub knows no keyword arguments
    task = remote(judge)
    options = {"caws": config.rollouts.caws, "claims": config.rollouts.claims}

    def score(texts: list[str], teacher_texts: list[str], tiers: list[int]) -> Judged:
        tiers = [tier or config.loss.caws_tier for tier in tiers]
        size = max(1, -(-len(texts) // num_tasks))
        chunks = [slice(start, start + size) for start in range(0, len(texts), size)]
        parts = ray.get([task.remote(texts[chunk], teacher_texts[chunk], tiers[chunk], **options) for chunk in chunks])
        nothing = judge([], [], [], **options)
        return Judged(*(np.concatenate(columns) for columns in zip(nothing, *parts, strict=True)))

    return score
