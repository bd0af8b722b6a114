"""Options of what samples are made into for some losses: latent spans, halting, code mode, rollouts. A part of config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raykd.loss_config import Fraction, Section, Weight


class LatentStage(Section):
    """One stage of the latent curriculum."""

    until_step: int | None = Field(default=None, ge=1)
    """The stage ends before this optimizer step; None: it is the last."""
    steps: int = Field(ge=1)
    """m: so many reasoning steps of a response are replaced."""
    slots: int = Field(ge=1)
    """c: slots for each of them."""
    probability: Fraction
    """p: share of the sequences that are rewritten."""


class LatentConfig(Section):
    """Reasoning steps replaced by latent slots: `<bot>` slot ... slot `<eot>`."""

    stages: tuple[LatentStage, ...] = ()
    """The curriculum; none: sequences stay as they are."""
    mode: Literal["mask", "continuous"] = "mask"
    """mask: slots have a learned embedding. continuous: the hidden state before a slot is its input embedding."""
    loops: int = Field(default=1, ge=1)
    """continuous: forward passes that fill the slots (Hao et al., 2024); at most as many as a span has slots."""
    begin: str = "<bot>"
    """Token that opens a span."""
    end: str = "<eot>"
    """Token that closes it."""
    slot: str = "<slot>"
    """Token of the slots."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        untils = [stage.until_step for stage in self.stages]
        known = [until for until in untils if until is not None]
        if known != sorted(set(known)) or None in untils[:-1]:
            raise ValueError(f"latent.stages end at steps {untils}; expected rising until_step, null at most in the last")
        num_slots = max((stage.steps * stage.slots for stage in self.stages), default=0)
        if self.mode == "continuous" and not self.stages:
            raise ValueError("latent.mode=continuous without latent.stages has no effect: there are no slots; add stages")
        if self.loops > 1 and self.mode == "mask":
            raise ValueError(
                f"latent.loops={self.loops} with latent.mode=mask has no effect: no pass fills the slots; use "
                "mode=continuous"
            )
        if self.loops > max(num_slots, 1):
            raise ValueError(
                f"latent.loops={self.loops} with spans of at most {num_slots} slots (steps x slots of latent.stages): "
                f"passes beyond that change nothing; use latent.loops={num_slots} or fewer"
            )
        return self


class HaltConfig(Section):
    """When a refinement loop should end: targets of the halt head, and the same rule when generating."""

    max_loops: int = Field(default=3, ge=1)
    """Loops of a conversation that names no number of its own."""
    judge_threshold: Fraction = 0.8
    """Quality from which halting is possible."""
    delta_threshold: Fraction = 0.05
    """Improvement over the last `delta_window` loops below which it is not worth going on."""
    delta_window: int = Field(default=1, ge=1)
    """Loops that the improvement is measured over."""
    delta_relative: bool = False
    """Measure the improvement as a share of the earlier score."""
    soft_targets: bool = False
    """Probabilities instead of 0 and 1: the two thresholds become logistic curves."""
    soft_width: float = Field(default=0.02, gt=0)
    """Width of those curves, in units of the score; towards 0 they become the thresholds again."""
    curriculum_stage: Literal[0, 1, 2] | None = None
    """What decides where no judge does. 0: go on until the cap; 1: halt once 3/4 of the allowed loops are done; 2: half of
    them. None: nothing does; those points have no target."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps before the halt loss begins."""
    halt_probability: Fraction = 0.5
    """Generation ends a refinement when the head gives at least this much; validation/halt_accuracy is taken there."""


class CodeModeConfig(Section):
    """Which samples should call tools through code; one of the rules is enough."""

    min_tools: int = Field(default=2, ge=1)
    """At least so many tool calls."""
    min_intermediate_chars: int = Field(default=10_000, ge=1)
    """A tool result of at least so many characters."""
    pii_patterns: tuple[str, ...] = (r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,255}\.\w", r"\b\d{3}-\d{2}-\d{4}\b")
    """Regular expressions of personal data; a tool result that matches makes the sample eligible."""


class RolloutConfig(Section):
    """Responses sampled from the student while it trains, for the losses that need its own text."""

    prompts_per_step: int = Field(default=0, ge=0)
    """Prompts of the step that the student answers too, over all workers; 0: no rollouts."""
    samples: int = Field(default=4, ge=2)
    """Answers to each; their mean reward without one's own is the baseline."""
    every: int = Field(default=1, ge=1)
    """Steps that train on the same answers: those are sampled in the first of them, and again after a restart."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature."""
    clip: float = Field(default=0.2, gt=0.0)
    """PPO's clip of the probability ratio, where answers are trained on in more than one step (`every`)."""
    caws: Weight = 1.0
    """Weight of the CAWS compliance score in the reward."""
    claims: Weight = 0.0
    """Weight of the claim score against the teacher's text in the reward."""
    length: Weight = 0.0
    """Weight of the penalty for answers longer than the teacher's in the reward."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        default = type(self).model_fields["clip"].default
        if self.every == 1 and self.clip != default:
            raise ValueError(
                f"rollouts.clip={self.clip:g} with rollouts.every=1 has no effect: answers are always fresh and no ratio is "
                f"clipped; set rollouts.every above 1, or leave the clip at {default:g}"
            )
        return self
