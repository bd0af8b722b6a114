"""Small networks on the student's hidden states: made with it, trained and saved beside it, dropped when it is served.

In:  the hidden size and the losses that are on. Out: an `nn.ModuleDict` with a head for each loss that needs one:

    halt             [H] -> [2]      logits of (continue, halt), read at decision points
    self_evaluation  [H] -> [1]      logit of the response's quality, read at its end
    projections      [Hs] -> [Ht]    by student layer: hidden states into the teacher's width (intermediate_layer)

A head that no active loss trains does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HALT = "halt"
SELF_EVALUATION = "self_evaluation"
PROJECTIONS = "projections"


def make_heads(
    hidden_size: int, losses: Mapping[str, float], projections: Mapping[int, tuple[int, int]] | None = None, *, seed: int = 0
) -> nn.ModuleDict:
    """Heads of the active losses, with random weights that come from `seed` alone.

    Args:
        hidden_size: H of the student.
        losses: weights of the losses that are on, by name (`LossConfig.weights`).
        projections: student layer -> (width in, width out), for the layers of intermediate_layer that need one.
    """
    heads = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if HALT in losses or "halt_ponder" in losses:
            heads[HALT] = nn.Linear(hidden_size, 2)
        if SELF_EVALUATION in losses:
            half = max(hidden_size // 2, 1)
            heads[SELF_EVALUATION] = nn.Sequential(nn.Linear(hidden_size, half), nn.GELU(), nn.Linear(half, 1))
        if projections:
            heads[PROJECTIONS] = nn.ModuleDict(
                {str(layer): nn.Linear(width, target, bias=False) for layer, (width, target) in projections.items()}
            )
    return heads


def read_head(head: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    """Output [D, C] of a head at some tokens: the one way in which heads are read, in training and when generating.

    In float32 also under autocast. With D = 0 the output is empty, and its gradient is zero instead of missing.

    Args:
        hidden: [B, T, H] after the final norm.
        index: [D] positions in the flattened [B*T].
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.flatten(0, 1)[index].float())


def projections_of(heads: nn.ModuleDict) -> nn.ModuleDict:
    """The projections by str(student layer); none where no layer needs one."""
    found = heads[PROJECTIONS] if PROJECTIONS in heads else nn.ModuleDict()
    assert isinstance(found, nn.ModuleDict), "projections are a ModuleDict"
    return found


def save_heads(heads: nn.ModuleDict, file: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write all heads into one safetensors file. `tensors`: theirs, where they hold a share of them only."""
    tensors = heads.state_dict() if tensors is None else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def heads_in(file: Path | None) -> set[str]:
    """Which of the halt and the self-evaluation head a file of heads holds; none without a file."""
    if file is None or not file.is_file():
        return set()
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
    return {name.partition(".")[0] for name in names} & {HALT, SELF_EVALUATION}


def load_heads(heads: nn.ModuleDict, file: Path) -> None:
    """Fill `heads` from a file that must hold exactly these. Errors: ValueError with what differs."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); expected the heads {sorted(heads)}") from error
    expected = {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = differing[0]
        raise ValueError(
            f"{file} holds other heads than the losses that are on need: {differing[:5]} differ ({name}: found "
            f"{found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}); go on with the losses and layers "
            "that the file was trained with"
        )
    heads.load_state_dict(tensors, strict=True)
