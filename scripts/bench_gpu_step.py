"""Time and memory of training steps on one GPU, of a student of the 1.7B shape: what distillation adds to cross-entropy.

    python scripts/bench_gpu_step.py --out bench      writes bench_gpu_step.json
    ... --device cpu --tiny                           a trial of the same code on any machine; its figures say nothing

Steps are those of the training loop: forward, backward, clipping, AdamW. Measured as in scripts/bench_gpu.py; memory
beside what `--plan` says.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gpu import GIB, Bench, Figures, Run, row, run_bench
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config

from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.student.quantization import set_quantized
from raykd.training.loop import count_tokens, step
from raykd.training.sizing import StudentSize, activations_per_token, worker_bytes
from raykd.training.trainer import Trainer, make_trainer
from raykd.types import Batch, Example, Mark, Source


def step_report(bench: Bench) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture = save_architecture(folder, bench)
        config = step_config(folder, bench)
        with torch.device(bench.device):  # weights are drawn there
            trainer = make_trainer(config, folder, num_steps=1000, teacher={}, device=torch.device(bench.device))
    num_parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    sequences = make_sequences(trainer.student.num_valid_ids, bench)
    micro = 2 if bench.tiny else 4  # sequences
    tokens = sum(len(example.input_ids) for example in sequences)
    parts = [sequences[start : start + micro] for start in range(0, len(sequences), micro)]
    with_teacher = [collate_kd_batch(part, 0) for part in parts]
    text_alone = [collate_kd_batch([without_teacher(example) for example in part], 0) for part in parts]
    kd = partial(our_step, trainer, with_teacher, {"kd": 1.0})
    steps: dict[str, tuple[Run, str]] = {
        "ce of transformers": (partial(transformers_step, trainer, text_alone), ""),
        "ce": (partial(our_step, trainer, text_alone, {"ce_teacher": 1.0}), ""),
        "kd": (kd, ""),
        "kd + ce": (partial(our_step, trainer, with_teacher, {"kd": 1.0, "ce_teacher": 0.5}), ""),
        "kd, int8": (kd, "int8"),
        "kd, checkpointing": (kd, "checkpointing"),
    }
    found = bench.in_turn({name: partial(switched, trainer, *how) for name, how in steps.items()})
    resident = torch.cuda.memory_allocated() / GIB if bench.device != "cpu" else 0.0  # weights and moments, no gradients
    planned = planned_gib(config, architecture, num_parameters)
    row(
        f"{num_parameters / 1e9:.2f}e9 parameters, {tokens} tokens", "ms", "/ ce", "tokens/s", "peak GiB", "planned", "ratio"
    )
    for name, figures in found.items():
        figures["peak_gib"] = resident + figures["extra_gib"]
        figures["planned_gib"] = planned["checkpointing" if "checkpointing" in name else "plain"]
        figures["over_ce"], figures["tokens_per_s"] = figures["ms"] / found["ce"]["ms"], tokens / figures["ms"] * 1e3
        cells = (figures["ms"], figures["over_ce"], figures["tokens_per_s"], figures["peak_gib"], figures["planned_gib"])
        row(name, *(f"{cell:.2f}" for cell in (*cells, figures["peak_gib"] / figures["planned_gib"])))
    return {
        "steps": found,
        "parameters": num_parameters,
        "tokens": tokens,
        "int8_over_float": found["kd, int8"]["ms"] / found["kd"]["ms"],
        "products": products(bench, architecture),
    }


def switched(trainer: Trainer, run: Run, switch: str) -> None:
    """The run in int8, with gradient checkpointing, or with neither."""
    set_quantized(trainer.student.model, switch == "int8")
    if switch == "checkpointing":
        trainer.student.model.gradient_checkpointing_enable({"use_reentrant": False})
    run()
    trainer.student.model.gradient_checkpointing_disable()


def our_step(trainer: Trainer, batches: list[Batch], weights: dict[str, float]) -> None:
    """One step of the training loop, with the counting that comes before it."""
    losses = trainer.config.loss.model_copy(update={"kd": 0.0, "ce_teacher": 0.0} | weights)
    counts = trainer.ranks.sum(count_tokens(batches, losses, trainer.context))
    step(trainer, batches, counts, losses)


def transformers_step(trainer: Trainer, batches: list[Batch]) -> None:
    """Cross-entropy as transformers computes it, on all tokens, with the same optimizer."""
    for batch in batches:
        ids = batch.input_ids.to(trainer.device, non_blocking=True)
        with trainer.autocast():
            loss = trainer.student.model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss / len(batches)).backward()
    torch.nn.utils.clip_grad_norm_(trainer.student.parameters(), trainer.config.train.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def planned_gib(config: Config, architecture: Qwen3Config, num_parameters: int) -> dict[str, float]:
    """What `--plan` says that a worker takes, with and without gradient checkpointing."""
    size, planned = StudentSize(num_parameters, num_parameters, architecture.vocab_size, architecture.hidden_size), {}
    for name, checkpointing in (("plain", False), ("checkpointing", True)):
        own = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": checkpointing})})
        planned[name] = worker_bytes(own, size, activations_per_token(own, architecture), 1) / GIB
    return planned


def save_architecture(folder: Path, bench: Bench) -> Qwen3Config:
    """The shape of Qwen3-1.7B, and a tokenizer of as many words as it has ids."""
    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151_936}
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    if bench.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    architecture = Qwen3Config(**sizes, **heads, tie_word_embeddings=True, eos_token_id=1)
    architecture.save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"])}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0").save_pretrained(folder)
    return architecture


def step_config(folder: Path, bench: Bench) -> Config:
    model = str(folder)
    values = {
        "stage": "qat",  # its layers compute in float as long as they are told to
        "quantization": {"activation_grid": "cuda"},
        "teacher": {"kind": "hf", "model": model},
        "student": {"model": model, "random_weights": True},
        "data": {"prompts": "none"},
        "loss": {"kd": 1.0, "ce_teacher": 0.5},
        "train": {"precision": "bfloat16", "max_tokens_per_micro_batch": 2 * 32 if bench.tiny else 4 * 1024},
        "run": {"dir": model},
    }
    return Config.model_validate(values)


def make_sequences(num_ids: int, bench: Bench) -> list[Example]:
    """Eight of 1024 tokens, all but the first 64 of them written by a teacher whose 64 best scores are known."""
    length, prompt, top_k = (32, 8, 8) if bench.tiny else (1024, 64, 64)
    random = np.random.default_rng(0)
    bucket, num = num_ids // top_k, length - prompt
    examples = []
    for uid in range(8):
        logprobs = np.sort(random.normal(size=(num, top_k + 1)) * 2)[:, ::-1]
        logprobs = logprobs - np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        examples.append(
            Example(
                uid=uid,
                source=Source.TEACHER,
                input_ids=random.integers(0, num_ids, length).astype(np.int32),
                marks=np.repeat([0, Mark.RESPONSE], [prompt, num]).astype(np.uint16),
                topk_ids=(random.integers(0, bucket, (num, top_k)) + bucket * np.arange(top_k)).astype(np.int32),
                topk_logprobs=logprobs[:, :top_k].astype(np.float16),
                log_tail=logprobs[:, top_k].astype(np.float32),
            )
        )
    return examples


def without_teacher(example: Example) -> Example:
    """The same text, for cross-entropy alone."""
    num = len(example.topk_ids)
    none = {"topk_ids": np.empty((num, 0), np.int32), "topk_logprobs": np.empty((num, 0), np.float16)}
    return replace(example, **none, log_tail=np.empty(0, np.float32))


def products(bench: Bench, architecture: Qwen3Config) -> dict[str, Figures]:
    """The product of the widest layer by itself, in int8 and in bfloat16."""
    tokens, inputs, outputs = 64 if bench.tiny else 8192, architecture.hidden_size, architecture.intermediate_size
    x, weight = (torch.randn(rows, inputs, device=bench.device) for rows in (tokens, outputs))
    codes, weight_codes = (tensor.mul(30).clamp(-127, 127).char() for tensor in (x, weight))
    x, weight = x.bfloat16(), weight.bfloat16()
    found = bench.in_turn({"int8": lambda: torch._int_mm(codes, weight_codes.T), "bfloat16": lambda: x @ weight.T})
    for name, figures in found.items():
        figures["tera_per_s"] = 2 * tokens * inputs * outputs / figures["ms"] / 1e9
        row(
            f"product {tokens} x {inputs} x {outputs}, {name}", f"{figures['ms']:.3f} ms", f"{figures['tera_per_s']:.0f} T/s"
        )
    return found


if __name__ == "__main__":
    run_bench("step", step_report, __doc__)
