"""Muon for small matrices on a CPU: momentum whose update is orthogonalised (Jordan et al. 2024).

In: a model's weight matrices. Out: their updates. torch's own Muon iterates in bfloat16, which CPUs without that
arithmetic emulate many times slower than the training step; here it is float32, matrices of one shape in one batch.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(update: Tensor, num_iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices of update [N, rows, columns], to about 20 %, by Newton-Schulz."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    The step's root mean square is 0.2 * lr whatever the shape (Liu et al. 2025), AdamW's usual size, so that both
    optimizers take learning rates of the same order.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (theirs takes a closure)
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                gradient = torch.stack([weight.grad for weight in weights if weight.grad is not None])
                state = self.state[weights[0]]
                velocity = state.setdefault("velocity", torch.zeros_like(gradient))
                velocity.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalize(gradient.lerp(velocity, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for weight, change in zip(weights, update, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=scale)
