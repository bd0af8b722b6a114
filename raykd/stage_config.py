"""Options of the stages: what a student starts from, and INT8. A part of config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raykd.loss_config import Fraction, Section

StageName = Literal["kd", "process", "answer", "qat"]


class InitConfig(Section):
    """An earlier run that the student starts from, instead of the weights of `student.model`."""

    from_: str | None = Field(default=None, alias="from")
    """Run folder (its newest checkpoint is taken) or checkpoint. None: start from `student`."""
    mode: Literal["stage", "init"] = "stage"
    """stage: weights and heads of the stage before, whose run must be finished and unchanged, with the same `student`
    section and the same tokens. init: its weights alone, from any checkpoint; heads start anew."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode != "stage" and self.from_ is None:
            raise ValueError(f"init.mode={self.mode} without init.from has no effect: name a run, or leave the mode out")
        return self


class QuantizationConfig(Section):
    """INT8 W8A8 of the student's linear layers: int8 weights, one scale per output row; int8 activations, one scale per
    token, found anew in every forward pass. The arithmetic is that of the server (raykd/student/quantization.py)."""

    ignore: tuple[str, ...] = ("lm_head",)
    """Linear layers that stay in float: regular expressions that match the whole name or its end after a dot. Embeddings and
    norms always do."""
    symmetric_activations: bool = True
    """Activation codes around 0. False: with a zero point, for activations that lean to one side."""
    activation_grid: Literal["cpu", "cuda"] = "cpu"
    """Whose rounding of activations: vLLM multiplies by 1/scale on the CPU, by 127/max on CUDA."""
    activation_shards: int = Field(default=1, ge=1)
    """Tensor-parallel size of the server: down and output projections there have a scale per token and shard."""
    start_step: int = Field(default=0, ge=0)
    """Optimizer steps in float before the layers are quantised; a waste where self_kd is the only loss, which is 0 then."""
    smoothing: Fraction = 0.0
    """SmoothQuant's alpha (Xiao et al., 2023): before the first step, how much of the activations' range is folded into the
    weights behind a norm; 0: none."""
