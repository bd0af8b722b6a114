"""`--plan` of every recipe in configs/, without the models: sizes of public models stand in for their folders.

    python scripts/plan.py [recipe …]        recipe: a name such as qwen3_8b_to_0.6b, or "qwen3_8b_to_0.6b + quant_qat_int8"

In:  configs/*.yaml. Out: for each the resolved config, batch arithmetic, memory, and the layout on 1, 8 and 64 GPUs.

A stand-in is a folder with the true config.json, the demo's tokenizer and no weights to speak of: enough for arithmetic.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from raykd.cli import load_config
from raykd.training.preflight import check, print_summary

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "raykd" / "demo" / "teacher"
STAGES = ("process_supervision", "answer_generation", "quant_qat_int8")


def qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> PretrainedConfig:
    """A dense Qwen3 as published: 8 key-value heads of 128, 151 936 ids."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    rest = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "tie_word_embeddings": tied, "dtype": "bfloat16"}
    return Qwen3Config(**sizes, **heads_of, **rest, eos_token_id=1)


def llama3(hidden: int, mlp: int, layers: int, head_dim: int, *, tied: bool) -> PretrainedConfig:
    """A Llama 3 as published: 32 heads, 8 of keys and values, 128 256 ids."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": head_dim}
    rest = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": tied, "dtype": "bfloat16"}
    return LlamaConfig(**sizes, **heads_of, **rest, eos_token_id=1)


MODELS = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-8B": qwen3(4096, 12_288, 36, 32, tied=False),
    "Qwen3-32B": qwen3(5120, 25_600, 64, 64, tied=False),
    "Llama-3.2-1B-Instruct": llama3(2048, 8192, 16, 64, tied=True),
    "Llama-3.1-8B-Instruct": llama3(4096, 14_336, 32, 128, tied=False),
    "teacher-32k": LlamaConfig(**json.loads((ROOT / "configs" / "models" / "worker_9b.json").read_text())),
}


def stand_in(folder: Path, architecture: PretrainedConfig) -> None:
    """A model folder that says what it is and holds nothing."""
    folder.mkdir(parents=True)
    architecture.save_pretrained(folder)
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)
    for file in TOKENIZER.glob("*.jinja"):
        shutil.copy(file, folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")


def overrides(files: list[Path], folder: Path) -> list[str]:
    """What points a recipe at the stand-ins and at files that exist."""
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello."}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config, rows = load_config(files), folder / "rows.jsonl"
    named = {
        "teacher.model": config.teacher.tokenizer_folder,
        "student.model": config.student.model,
        "student.tokenizer": config.student.tokenizer,
    }
    models = [f"{key}={folder / Path(path).name}" for key, path in named.items() if path and Path(path).name in MODELS]
    return [*models, f"data.prompts={rows}", f"data.held_out={rows}", f"run.dir={folder}"]


def main() -> None:
    """Plan the recipes that are named, or all, and the later stages on top of one of them."""
    configs = ROOT / "configs"
    recipes = sorted(file.stem for file in configs.glob("*.yaml") if "models/" in file.read_text())
    recipes += [f"qwen3_8b_to_0.6b + {stage}" for stage in STAGES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, architecture in MODELS.items():
            stand_in(folder / model, architecture)
        for recipe in sys.argv[1:] or recipes:
            files = [configs / f"{part}.yaml" for part in recipe.split(" + ")]
            print(f"\n=== {recipe}", flush=True)
            config = load_config(files, overrides(files, folder))
            print_summary(config, check(config), numbers=None, cluster=None)  # whatever Ray runs here is not meant


if __name__ == "__main__":
    main()
