"""A model and its tokenizer once more, under other ids and with more tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def save_moved(path: Path, source: Path, extra: tuple[str, ...] = ("<x>", "<y>", "<z>")) -> np.ndarray:
    """The model of `source` with all ids shuffled, and with `extra` special tokens among them, whose rows are zeros.

    The chat template stays. Returns the new id of every old one. The embedding is tied, as in `save_tiny_model`.
    """
    shutil.copytree(source, path)
    state = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    old = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    num_ids = len(old) + len(extra)
    places = np.random.default_rng(0).permutation(num_ids)
    new = {token: int(places[i]) for token, i in old.items()}
    new |= {token: int(places[len(old) + i]) for i, token in enumerate(extra)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [*state["added_tokens"], *({"content": token, **plain} for token in extra)]
    state["added_tokens"] = sorted(
        ({**token, "id": new[token["content"]]} for token in added), key=lambda token: token["id"]
    )
    state["model"]["vocab"] = new
    (path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((source / name).read_text())
        ids = {key: int(places[config[key]]) for key in ("eos_token_id", "pad_token_id")}
        (path / name).write_text(json.dumps(config | ids | ({"vocab_size": num_ids} if name == "config.json" else {})))
    weights = load_file(source / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    moved = torch.zeros(num_ids, rows.shape[1], dtype=rows.dtype)
    moved[torch.from_numpy(places[: len(old)])] = rows[: len(old)]
    save_file(weights | {"model.embed_tokens.weight": moved}, path / "model.safetensors", {"format": "pt"})
    return places[: len(old)]
