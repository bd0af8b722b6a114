"""Losses of distillation, tool-use supervision and halting: pure functions from tensors to `TokenLoss`."""

from raykd.losses.code_mode import CodeModePreferenceLoss
from raykd.losses.combined import combined_kd_loss
from raykd.losses.cross_entropy import integration_copy_loss, json_argument_loss, tool_name_loss
from raykd.losses.early_tool_call import early_tool_call_loss
from raykd.losses.heads import halt_head_loss, self_evaluation_loss
from raykd.losses.intermediate import intermediate_layer_loss
from raykd.losses.length_aware import length_aware_kd_loss
from raykd.losses.scored import caws_compliance_loss, claim_extraction_loss

__all__ = [
    "CodeModePreferenceLoss",
    "caws_compliance_loss",
    "claim_extraction_loss",
    "combined_kd_loss",
    "early_tool_call_loss",
    "halt_head_loss",
    "integration_copy_loss",
    "intermediate_layer_loss",
    "json_argument_loss",
    "length_aware_kd_loss",
    "self_evaluation_loss",
    "tool_name_loss",
]
