"""Losses of token-level distillation and tool-use supervision: pure functions from tensors to `TokenLoss`."""

from raykd.losses.cross_entropy import integration_copy_loss, json_argument_loss, tool_name_loss

__all__ = ["integration_copy_loss", "json_argument_loss", "tool_name_loss"]
