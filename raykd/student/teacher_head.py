"""The end of a teacher: its final norm and LM head alone, for losses over the whole vocabulary.

In:  the Hugging Face folder of a causal language model with *.safetensors.
Out: TeacherHead: states after the last decoder layer -> norm -> logits. Only these tensors are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


class TeacherHead(NamedTuple):
    """What turns the state [.., H] after the teacher's last layer into logits: norm(state) @ weight.T + bias. Frozen."""

    norm: nn.Module
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


def load_teacher_head(model_folder: str | Path, dtype: torch.dtype = torch.float32) -> TeacherHead:
    """Read the final norm and the LM head (the embedding where the two are tied) of the model in a folder, onto the CPU.

    Raises ValueError where a tensor is missing, and where the model's logits are more than head(norm(state)), such as
    scaled or soft-capped ones.
    """
    folder = Path(model_folder)
    with torch.device("meta"):  # modules and their names, no weights
        architecture = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager").eval()
    head = model.get_output_embeddings()
    norm = _final_norm(model, head, folder)
    names = {id(module): name for name, module in model.named_modules()}
    tied = head.weight is model.get_input_embeddings().weight
    weight_name = f"{names[id(model.get_input_embeddings() if tied else head)]}.weight"
    bias_name = f"{names[id(head)]}.bias" if head.bias is not None else None
    norm_names = {f"{names[id(norm)]}.{name}": name for name in norm.state_dict()}
    tensors = _read(folder, {weight_name, *norm_names, *([bias_name] if bias_name else [])})
    norm = norm.to_empty(device="cpu").to(dtype).requires_grad_(False)
    norm.load_state_dict({short: tensors[name] for name, short in norm_names.items()}, strict=True)
    return TeacherHead(norm, tensors[weight_name].to(dtype), tensors[bias_name].to(dtype) if bias_name else None)


def _final_norm(model: nn.Module, head: nn.Module, folder: Path) -> nn.Module:
    """The module whose output is the head's input; checked, on shapes alone, to be all there is around the head."""
    last: dict[str, tuple[nn.Module, Tensor]] = {}  # the module that ran last before the head, and what it gave out
    seen: dict[str, Tensor] = {}

    def after(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and "head" not in seen and module is not head:
            last["norm"] = (module, output)

    def around_head(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["head"] = inputs[0], output

    hooks = [module.register_forward_hook(after) for module in model.modules() if not list(module.children())]
    hooks.append(head.register_forward_hook(around_head))
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        # With a mask and plain attention no value is looked at, which a tensor without values could not give.
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for hook in hooks:
            hook.remove()
    norm, output = last["norm"]
    # A slice of all positions is a view of the norm's output.
    same_input = seen["input"] is output or seen["input"]._base is output
    if logits is not seen["head"] or not same_input or "Norm" not in type(norm).__name__:
        raise ValueError(
            f"{type(model).__name__} ({folder}) makes its logits in another way than head(norm(state)) (last module before "
            f"the head: {type(norm).__name__}); loss.kd_support=full cannot follow it, use kd_support=topk_tail"
        )
    return norm


def _read(folder: Path, names: set[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names.intersection(file.keys())}
    missing = sorted(names - tensors.keys())
    if missing:
        raise ValueError(f"{folder} has no tensors {missing} in its *.safetensors; take the complete checkpoint")
    return tensors
