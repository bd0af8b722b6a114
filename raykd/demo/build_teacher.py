"""Trains the demo teacher from scratch: `python -m raykd.demo.build_teacher --config teacher_recipe.yaml --out DIR`.

In: a recipe (YAML). Out: a Hugging Face folder (bfloat16 weights, tokenizer, recipe) and its held-out accuracy.

A short plain loop: fresh conversations every step, batches of similar length, Muon for the layers' matrices and AdamW
for the rest, warm-up and cosine, loss on the assistant turns plus a little on the rest so that copying forms early.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raykd.demo.corpus import generate, generate_conversations
from raykd.demo.grade import Grade, grade_greedy
from raykd.demo.muon import Muon
from raykd.demo.tokenizer import train_tokenizer

RECIPE_PATH = Path(__file__).with_name("teacher_recipe.yaml")


@dataclass(frozen=True)
class TeacherRecipe:
    """Everything that decides the teacher's weights. Sizes in tokens or features, rates per step."""

    seed: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_position_embeddings: int
    num_steps: int
    batch_tokens: int
    matrix_lr: float
    other_lr: float
    warmup_steps: int
    weight_decay: float
    prompt_weight: float
    prompt_share: float
    num_grades: int
    num_threads: int


def new_model(recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised float32 model with tied embeddings."""
    torch.manual_seed(recipe.seed)
    special_ids: Any = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    eos_id, pad_id = special_ids
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.max_position_embeddings,
            tie_word_embeddings=True,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            bos_token_id=None,
        )
    )


def batches(recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input_ids [B,T], marks [B,T]) of at most `batch_tokens` tokens.

    marks: 1 on assistant tokens, 0 on other text, -1 on padding. A pool of conversations is sorted by length before it
    is cut into batches, so that little padding is needed; right padding under a causal mask needs no attention mask.
    """
    pad_id: Any = tokenizer.pad_token_id
    rng = np.random.default_rng(recipe.seed)
    pool_seed = recipe.seed
    while True:
        pool_seed += 1
        pool = [_encode(tokenizer, row) for row in generate_conversations(512, pool_seed, "train")]
        groups = _group_by_length(sorted(pool, key=lambda item: item.shape[1]), recipe.batch_tokens)
        for index in rng.permutation(len(groups)):
            group = groups[index]
            batch = torch.full((len(group), 2, group[-1].shape[1]), -1)
            for row, item in zip(batch, group, strict=True):
                row[:, : item.shape[1]] = item
            ids, marks = batch.unbind(1)
            yield ids.masked_fill(marks == -1, pad_id), marks


def _encode(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> Tensor:
    """[2,T]: input ids and, 1 or 0, whether the assistant wrote them."""
    encoded: Any = tokenizer.apply_chat_template(
        row["messages"], tools=row["tools"], return_dict=True, return_assistant_tokens_mask=True
    )
    return torch.tensor([encoded["input_ids"], encoded["assistant_masks"]])


def _group_by_length(items: list[Tensor], batch_tokens: int) -> list[list[Tensor]]:
    """Cut items, shortest first, into groups that padded to their longest hold at most batch_tokens."""
    groups: list[list[Tensor]] = [[]]
    for item in items:
        if groups[-1] and (len(groups[-1]) + 1) * item.shape[1] > batch_tokens:
            groups.append([])
        groups[-1].append(item)
    return groups


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, marks: Tensor, recipe: TeacherRecipe) -> tuple[Tensor, Tensor]:
    """(training loss, mean negative log-likelihood of the assistant tokens), both in nats, scalars.

    Only a random `prompt_share` of the other text is predicted: enough to learn from, and the head's cost stays small.
    """
    targets, marks = ids[:, 1:], marks[:, 1:]
    chosen = (marks == 1) | ((marks == 0) & (torch.rand(marks.shape) < recipe.prompt_share))
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    nll = functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen], reduction="none")
    assistant = marks[chosen] == 1
    answer_nll = nll[assistant].mean()
    return answer_nll + recipe.prompt_weight * nll[~assistant].mean(), answer_nll.detach()


def train(recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Run the recipe. Prints the loss and, `num_grades` times on the way, the held-out accuracy."""
    model = new_model(recipe, tokenizer).train()
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in layers)]
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    optimizers = [
        Muon(layers, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        done = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    num_tokens, smooth, wall, cpu = 0, 0.0, time.perf_counter(), time.process_time()
    for step, (ids, marks) in enumerate(islice(batches(recipe, tokenizer), recipe.num_steps), 1):
        loss, answer_nll = loss_of(model, ids, marks, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        num_tokens += ids.numel()
        smooth = answer_nll.item() if step == 1 else 0.95 * smooth + 0.05 * answer_nll.item()
        if step % 50 == 0 or step == recipe.num_steps:
            minutes, cpu_minutes = (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60
            print(
                f"step {step}/{recipe.num_steps}  loss {smooth:.4f}  {num_tokens / 1e6:.2f} M tokens  "
                f"{minutes:.1f} min ({cpu_minutes:.1f} CPU min)",
                flush=True,
            )
        if step < recipe.num_steps and step % (recipe.num_steps // (recipe.num_grades + 1)) == 0:
            print(grade_greedy(model, tokenizer, list(generate(100, 1, "held_out"))), flush=True)
            model.train()
    return model


def build(recipe: TeacherRecipe, out: Path, num_held_out: int = 600) -> Grade:
    """Train, round to bfloat16, save to `out`, and grade what was saved (loaded as float32)."""
    torch.set_num_threads(recipe.num_threads)
    tokenizer = train_tokenizer(generate_conversations(6000, recipe.seed, "train"), recipe.vocab_size)
    tokenizer.save_pretrained(out)
    model = train(recipe, tokenizer)
    model.bfloat16().save_pretrained(out)
    (out / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe), sort_keys=False))
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return grade_greedy(saved, tokenizer, list(generate(num_held_out, 0, "held_out")))


def main(argv: list[str] | None = None) -> None:
    """Train the demo teacher and print its held-out accuracy."""
    parser = argparse.ArgumentParser(prog="python -m raykd.demo.build_teacher", description=main.__doc__)
    parser.add_argument("--config", type=Path, default=RECIPE_PATH)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the teacher into")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    grade = build(TeacherRecipe(**yaml.safe_load(options.config.read_text())), options.out)
    times = os.times()
    print(grade)
    print(
        json.dumps(
            {
                "wall_minutes": round((time.perf_counter() - started) / 60, 2),
                "cpu_minutes": round((times.user + times.system) / 60, 2),
                "megabytes": round(sum(f.stat().st_size for f in options.out.iterdir()) / 1e6, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
