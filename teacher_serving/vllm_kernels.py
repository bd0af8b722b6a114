"""What vLLM computes each layer of a loaded model with: proof that a quantised model is served quantised.

In:  an engine. Out: the kernel of every quantised linear layer, by the layer's name in the model's files.
"""

from __future__ import annotations

from typing import Any

from teacher_serving.vllm_engine import VllmEngine


def layer_kernels(engine: VllmEngine) -> dict[str, str]:
    """Layer -> class of its kernel, which vLLM's log calls "Selected ...". Layers in float are not in it.

    For an engine that is asked nothing at the moment.
    """
    return engine._engine.apply_model(_kernels)[0]


def _kernels(model: Any) -> dict[str, str]:
    fused = model.packed_modules_mapping  # qkv_proj -> [q_proj, k_proj, v_proj]
    found = {}
    for name, module in model.named_modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            prefix, dot, own = name.rpartition(".")
            found |= {f"{prefix}{dot}{part}": type(kernel).__name__ for part in fused.get(own, [own])}
    return found
