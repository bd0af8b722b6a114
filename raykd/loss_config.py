"""Options of the losses. A part of config.py."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, serialize_by_alias=True)


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl"]
Support = Literal["topk_tail", "topk_renorm", "topk_zero", "full"]

PROCESS_LOSSES = (
    "tool_name",
    "tool_choice",
    "json_argument",
    "json_grammar",
    "integration_copy",
    "copy_mass",
    "number_contradiction",
)
"""Those that supervise the steps of tool use: which tool, with which arguments, and what becomes of its result."""

LOSSES = (
    "kd",
    "self_kd",
    "ce_teacher",
    "ce_truth",
    *PROCESS_LOSSES,
    "intermediate_layer",
    "self_evaluation",
    "halt",
    "halt_ponder",
    "caws_compliance",
    "claim_extraction",
    "code_mode_preference",
    "length_aware",
    "early_tool_call",
    "policy_gradient",
)
"""Every loss: its weight in `LossConfig`, its key in the logs (`loss/<name>`), its function (`<name>_loss`)."""


class Schedule(Section):
    """The course of one number of `loss` (a weight, kd_temperature) over a run."""

    kind: Literal["constant", "linear", "cosine", "staged"]
    """linear and cosine go from `start` to `end` over the first `over` steps or tokens and stay there."""
    by: Literal["step", "tokens"] = "step"
    """What time is measured in: optimizer steps, or supervised tokens trained on."""
    start: float | None = None
    """Value at 0; constant: the value."""
    end: float | None = None
    """Value from `over` on."""
    over: int | None = Field(default=None, ge=1)
    """Steps or tokens from start to end."""
    stages: tuple[tuple[int, float], ...] = ()
    """staged: (until, value) in rising order; the last value stays."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"constant": ("start",), "linear": ("start", "end", "over"), "staged": ()}
        needed["cosine"] = needed["linear"]
        missing = [name for name in needed[self.kind] if getattr(self, name) is None]
        if missing or (self.kind == "staged") != bool(self.stages):
            raise ValueError(f"a {self.kind} schedule needs {', '.join(missing) or 'stages'} and nothing else")
        given = [
            name for name in ("start", "end", "over") if getattr(self, name) is not None and name not in needed[self.kind]
        ]
        if given:
            raise ValueError(
                f"a {self.kind} schedule has no {given[0]}; expected {', '.join(needed[self.kind]) or 'stages'}"
            )
        untils = [until for until, _ in self.stages]
        if untils != sorted(set(untils)):
            raise ValueError(f"stages={list(self.stages)}: expected (until, value) pairs with rising `until`")
        return self


class LossConfig(Section):
    """Weights of the losses and how they are computed. A weight of 0 switches a loss off."""

    kd: Weight = 1.0
    """Divergence between the teacher's and the student's next-token distributions, on all response tokens."""
    self_kd: Weight = 0.0
    """KL(student as the run began || student) over the whole vocabulary, on all response tokens; the former is frozen and
    in float: in stage qat what the INT8 student is to stay close to."""
    ce_teacher: Weight = 0.0
    """Cross-entropy on text that the teacher wrote."""
    ce_truth: Weight = 0.0
    """Cross-entropy on recorded text (data.completions=recorded)."""
    tool_name: Weight = 0.0
    """Cross-entropy on the tokens of tool names."""
    tool_choice: Weight = 0.0
    """Where the names of the offered tools part: cross-entropy of the right branch among those of the offered tools only."""
    json_argument: Weight = 0.0
    """Cross-entropy on the tokens of tool-call arguments."""
    json_grammar: Weight = 0.0
    """-log of the probability mass on the tokens that the tool's JSON Schema allows next, in arguments."""
    integration_copy: Weight = 0.0
    """Cross-entropy on response tokens that reuse a value of a tool result."""
    copy_mass: Weight = 0.0
    """-log of the mass on all ids that go on with the copy of a tool result, within reused values."""
    number_contradiction: Weight = 0.0
    """Unlikelihood of ids that would write another number of the tool results, within reused numbers."""
    intermediate_layer: Weight = 0.0
    """Distance between chosen hidden states of student and teacher (teacher.hidden_layers ships them)."""
    self_evaluation: Weight = 0.0
    """Self-evaluation head against the quality score of the sequence, at the end of the response."""
    halt: Weight = 0.0
    """Cross-entropy of the halt head at the decision points of refinement loops."""
    halt_ponder: Weight = 0.0
    """Refinement loops to expect of the halt head, mean over the sequences with decision points."""
    caws_compliance: Weight = 0.0
    """Unlikelihood of latent spans beyond the tier's budget and of unbalanced <bot> and <eot>."""
    claim_extraction: Weight = 0.0
    """Cross-entropy and divergence once more on the tokens of checkable claims."""
    code_mode_preference: Weight = 0.0
    """Likelihood of code that calls tools and unlikelihood of direct calls, on samples where code mode pays; where offline
    rows have a `rejected_text`, preference of `teacher_text` over it (DPO) against the student as the run began."""
    length_aware: Weight = 0.0
    """EOS where the teacher stopped and, on rollouts, expected length beyond the teacher's."""
    early_tool_call: Weight = 0.0
    """At the start of a turn: mass on the openings of a call where one follows, unlikelihood of them where none does."""
    policy_gradient: Weight = 0.0
    """REINFORCE with a leave-one-out baseline on the rewards of student rollouts (`rollouts`)."""

    process_share: Fraction | None = None
    """Share of the losses on tool use (tool_name, tool_choice, json_argument, json_grammar, integration_copy, copy_mass,
    number_contradiction) in the weights: theirs add up to it, those of all others to the rest, each in the ratios given
    above. None: the weights are taken as they are."""
    schedules: dict[str, Schedule] = {}
    """Course of any weight above, or of kd_temperature, by name; replaces the number given there."""

    kd_divergence: Divergence = "forward_kl"
    """forward_kl is KL(teacher || student); jsd = kd_beta*KL(T||M) + (1-kd_beta)*KL(S||M), M = kd_beta*T + (1-kd_beta)*S."""
    kd_support: Support = "topk_tail"
    """topk_tail: the teacher's K ids and one bucket for the rest; topk_renorm: both sides renormalised over the K;
    topk_zero: teacher renormalised over the K, student over the whole vocabulary; full: the whole vocabulary on both
    sides, from the teacher's last hidden state (teacher.hidden_layers must hold its last layer)."""
    kd_beta: Fraction = 0.5
    """Mixture weight of jsd and of the skewed divergences."""
    kd_temperature: float = Field(default=1.0, gt=0.0)
    """Softening temperature; the loss carries temperature squared. Other than 1 only with topk_renorm and full."""
    ce_teacher_target: Literal["sampled", "argmax"] = "sampled"
    """sampled: the token the teacher emitted; argmax: its most likely token given the same prefix."""
    json_structure_weight: Weight = 1.0
    """Weight of braces, brackets, colons, commas and quotes within json_argument."""
    json_key_weight: Weight = 1.0
    """Weight of argument names within json_argument."""
    json_value_weight: Weight = 1.0
    """Weight of argument values within json_argument."""
    kd_entropy: Literal["off", "token", "run"] = "off"
    """token: weigh every token's divergence by the teacher's entropy there; run: weigh kd by the running mean entropy."""
    kd_entropy_range: tuple[float, float] | None = None
    """Entropies in nats between which the weight rises from kd_entropy_floor to 1. None: the 10th and 90th percentile of
    the first kd_entropy_calibration_steps steps."""
    kd_entropy_calibration_steps: int = Field(default=20, ge=1)
    """Steps that calibrate the range; the weight is 1 meanwhile."""
    kd_entropy_floor: Fraction = 0.5
    """Least weight: distillation is never switched off by entropy."""
    kd_entropy_decay: Fraction = 0.95
    """run: share of the running mean entropy that every step keeps."""
    tool_choice_temperature: float = Field(default=1.0, gt=0.0)
    """Temperature of the softmax over the offered tools in tool_choice."""
    claim_ce_share: Fraction = 0.5
    """claim_extraction = share * cross-entropy + (1 - share) * divergence."""
    intermediate_mse_weight: Weight = 1.0
    """Weight of the mean squared error (states divided by the teacher layer's RMS) within intermediate_layer."""
    intermediate_cosine_weight: Weight = 1.0
    """Weight of 1 - cosine within intermediate_layer."""
    intermediate_tokens: Literal["all", "response"] = "all"
    """Tokens whose states are compared."""
    layer_map: Literal["uniform", "last_k"] | dict[int, int] = "uniform"
    """Student layer -> teacher layer, counted from 0. uniform: each shipped teacher layer with the student layer of the same
    relative depth, first with first and last with last; last_k: the student's last layers onto the shipped ones."""
    self_evaluation_kind: Literal["bce", "mse"] = "bce"
    """Binary cross-entropy on the logit, or squared error of the probability."""
    self_evaluation_detach: bool = False
    """Train the self-evaluation head alone, not the layers below it."""
    halt_label_smoothing: Fraction = 0.0
    """Share of every halt target that is spread over both classes."""
    halt_class_weights: tuple[Weight, Weight] | None = None
    """Weights of (continue, halt). None: inverse frequencies, as a running mean over the steps."""
    caws_tier: Literal[1, 2, 3] = 2
    """CAWS tier of samples whose data names none (`caws_tier`): at most 0, 1 or 3 latent spans in caws_compliance and in the
    rewards of rollouts.caws, at most 1, 2 or 3 loops of a refinement in the targets of halt."""
    code_mode_positive_weight: Weight = 1.0
    """Weight of the likelihood of code within code_mode_preference."""
    code_mode_negative_weight: Weight = 1.0
    """Weight of the unlikelihood of direct calls within code_mode_preference."""
    code_mode_beta: float = Field(default=0.1, gt=0.0)
    """Sharpness of the preference between the two sequences of a pair, where the data has pairs."""
    length_hinge: Weight = 0.15
    """Excess of the expected length over the teacher's, as a share of it, that costs nothing."""
    length_slope: Weight = 1.0
    """Cost per unit of excess beyond the hinge."""
    early_tool_tokens: int = Field(default=25, ge=1)
    """First tokens of a turn with a call that get cross-entropy within early_tool_call."""
    early_tool_ce_weight: Weight = 0.2
    """Weight of that cross-entropy."""
    early_tool_prior_weight: Weight = 1.0
    """Weight of the mass on call openings at the first token of a turn with a call, and of their unlikelihood elsewhere."""

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses that are on, by name."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name) > 0 or name in self.schedules}

    @property
    def student_to_teacher(self) -> bool:
        """Whether kd is KL(student || teacher): infinite where the teacher has no mass."""
        at_the_end = {"jsd": 1.0, "skewed_reverse_kl": 0.0}.get(self.kd_divergence)
        return self.kd_divergence == "reverse_kl" or at_the_end == self.kd_beta

    @property
    def terms(self) -> dict[str, float]:
        """Weights of what is summed up: the losses, of some each part by itself, because it has tokens (or pairs, or
        answers) of its own to be divided by."""
        factors = {
            "code_mode_preference": {
                "": self.code_mode_positive_weight, "/direct": self.code_mode_negative_weight, "/pair": 1.0,
            },
            "early_tool_call": {"": self.early_tool_prior_weight, "/ce": self.early_tool_ce_weight},
            "length_aware": {"": 1.0, "/excess": 1.0},
        }  # fmt: skip
        weights = self._shared(self.weights)
        parts = {name: factors.get(name, {"": 1.0}) for name in weights}
        return {name + part: weights[name] * factor for name in parts for part, factor in parts[name].items()}

    def _shared(self, weights: dict[str, float]) -> dict[str, float]:
        """The weights with `process_share` applied."""
        if self.process_share is None:
            return weights
        of_process = sum(weight for name, weight in weights.items() if name in PROCESS_LOSSES)
        of_others = sum(weights.values()) - of_process
        scale = {True: self.process_share / (of_process or 1.0), False: (1.0 - self.process_share) / (of_others or 1.0)}
        return {name: weight * scale[name in PROCESS_LOSSES] for name, weight in weights.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.weights:
            raise ValueError("every loss weight is 0: set at least one of the weights in `loss` above 0")
        on = {name in PROCESS_LOSSES for name in self.weights}
        if self.process_share is not None and len(on) < 2:
            raise ValueError(
                f"loss.process_share={self.process_share:g} with {', '.join(self.weights)} alone: it shares the weights out "
                f"between {', '.join(PROCESS_LOSSES)} and the others; set one of each kind above 0, or no process_share"
            )
        unknown = sorted(self.schedules.keys() - {*LOSSES, "kd_temperature"})
        if unknown:
            raise ValueError(f"loss.schedules has {unknown[0]!r}; expected names of losses, or kd_temperature")
        for name, schedule in self.schedules.items():
            given = (schedule.start, schedule.end, *(value for _, value in schedule.stages))
            least = min(value for value in given if value is not None)
            if least < 0 or (least == 0 and name == "kd_temperature"):
                bound = "above 0" if name == "kd_temperature" else "of at least 0"
                raise ValueError(f"loss.schedules.{name} has {least}; expected numbers {bound}")
        if self.kd_entropy_range is not None and not 0 <= self.kd_entropy_range[0] < self.kd_entropy_range[1]:
            raise ValueError(
                f"loss.kd_entropy_range={list(self.kd_entropy_range)}: expected two entropies in nats, the lower one first"
            )
        if self.kd_entropy != "off" and ("kd" not in self.weights or self.kd_support == "full"):
            raise ValueError(
                f"loss.kd_entropy={self.kd_entropy} with loss.kd={self.kd:g} and loss.kd_support={self.kd_support}: it "
                "weighs kd by the teacher's top-k; set loss.kd above 0 and another support, or kd_entropy=off"
            )
        softened = self.kd_temperature != 1.0 or "kd_temperature" in self.schedules
        if softened and self.kd_support not in ("topk_renorm", "full"):
            raise ValueError(
                f"loss.kd_temperature={self.kd_temperature} with loss.kd_support={self.kd_support}: the teacher's mass "
                "outside its top-k is unknown at a temperature other than 1; use kd_temperature=1, or topk_renorm or full"
            )
        if self.student_to_teacher and self.kd_support == "topk_zero":
            raise ValueError(
                f"loss.kd_divergence={self.kd_divergence} (kd_beta={self.kd_beta:g}) with loss.kd_support=topk_zero: the "
                "student has mass where this teacher has none, the divergence is infinite; use kd_support=topk_tail"
            )
        if self.weights.keys() == {"json_argument"} and not (
            self.json_structure_weight or self.json_key_weight or self.json_value_weight
        ):
            raise ValueError("loss.json_argument is the only loss but all its class weights are 0")
        return self
