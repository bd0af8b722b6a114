"""The model that learns: any Hugging Face causal language model, stopped before its LM head.

In:  StudentConfig (a folder, or a config.json with random weights, or some layers of a larger model).
Out: `Student`: input_ids -> StudentOutput; the head's weight for the losses; a plain Hugging Face folder on `save`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from raykd.config import StudentConfig
from raykd.student.heads import HALT, SELF_EVALUATION, read_head
from raykd.student.latent import LatentSpans, fill_slots
from raykd.student.tokenizer import migrate
from raykd.types import StudentOutput
from teacher_serving.identity import vocabulary_size

KEPT_IN_STAND_INS = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "pad_token_id", "dtype")


class Student(nn.Module):
    """A causal LM in float32 whose forward pass ends at the final norm; logits are the business of the losses.

    Beside it stand the `heads` of the losses that need one (student/heads.py). `layers` names the decoder layers, counted
    from 0, whose outputs a forward pass is to hand out; `detach_self_evaluation` keeps that head's gradient to itself. With
    `latent` in continuous mode the inputs at its slots are the student's own states (student/latent.py).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saved_dtype: torch.dtype):
        """`saved_dtype` is what config.json of a saved student names: the type that servers load it in."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.saved_dtype = saved_dtype
        self.heads = nn.ModuleDict()
        self.layers: tuple[int, ...] = ()
        self.latent: LatentSpans | None = None
        self.detach_self_evaluation = False

    def forward(
        self,
        input_ids: torch.Tensor,
        decision_index: torch.Tensor | None = None,
        end_index: torch.Tensor | None = None,
        latent_width: int | None = None,
    ) -> StudentOutput:
        """One pass over input_ids [B, T] padded on the right: all that the losses look at, and nothing else.

        No attention mask: a causal model never looks to the right, so padding there reaches no real position, and without
        a mask the fast causal kernels run. What comes out at padding is finite and meaningless.

        Args:
            decision_index: int64 [D] in the flattened [B*T]; where the halt head, if there is one, is read. D may be 0.
            end_index: int64 [B] in the flattened [B*T]; where the self-evaluation head, if there is one, is read.
            latent_width: slots are in the columns before this one (`latent_width`); None: anywhere.
        """
        inputs = {"input_ids": input_ids}
        if self.latent is not None and self.latent.loops and latent_width != 0:
            is_slot = input_ids == self.latent.slot_id
            filled = fill_slots(self.model, input_ids, is_slot, loops=self.latent.loops, width=latent_width)
            inputs = {"inputs_embeds": filled}
        with _layer_outputs(self.model, self.layers) as layers:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        halt_logits = quality_logits = None
        if HALT in self.heads and decision_index is not None:
            halt_logits = read_head(self.heads[HALT], hidden, decision_index)
        if SELF_EVALUATION in self.heads and end_index is not None:
            read_from = hidden.detach() if self.detach_self_evaluation else hidden
            logits = read_head(self.heads[SELF_EVALUATION], read_from, end_index)
            quality_logits = logits.squeeze(-1).clone()  # FSDP hooks what comes out, and warns of views
        return StudentOutput(hidden, tuple(layers[layer] for layer in self.layers), halt_logits, quality_logits)

    def latent_width(self, input_ids: torch.Tensor) -> int:
        """Columns of input_ids [B, T] up to the last slot; 0 without any, or in mask mode. Reads values: ask on the host."""
        if self.latent is None or not self.latent.loops:
            return 0
        columns = (input_ids == self.latent.slot_id).any(dim=0).nonzero()
        return int(columns[-1]) + 1 if len(columns) else 0

    @property
    def hidden_size(self) -> int:
        """H: width of the hidden states."""
        return self.head_weight.shape[1]

    @property
    def head_weight(self) -> torch.Tensor:
        """Weight of the LM head [V, H]; the embedding itself where the two are tied."""
        return _head(self.model).weight

    @property
    def head_bias(self) -> torch.Tensor | None:
        """Bias of the LM head [V], if it has one."""
        return _head(self.model).bias

    @property
    def num_valid_ids(self) -> int:
        """Ids that the tokenizer knows; rows of the head beyond them are padding and no token."""
        return min(vocabulary_size(self.tokenizer), self.head_weight.shape[0])

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder: safetensors, config, generation config, tokenizer.

        Weights stay in float32, so that training can go on from them exactly; config.json names `saved_dtype`, the type
        in which transformers and vLLM will load them. `tensors`: the model's, where it holds a share of them only.
        """
        self.model.save_pretrained(folder, state_dict=None if tensors is None else dict(tensors))
        trained_dtype = self.model.config.dtype
        self.model.config.dtype = self.saved_dtype
        self.model.config.save_pretrained(folder)
        self.model.config.dtype = trained_dtype
        self.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _layer_outputs(model: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[dict[int, torch.Tensor]]:
    """Within: the outputs [B, T, H] of these decoder layers, by layer, as a forward pass comes by them.

    The hooks are gone before the backward pass, so that gradient checkpointing does not run into them again.
    """
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            found[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    with contextlib.ExitStack() as stack:
        for layer in layers:
            module = decoder_layers(model)[layer]
            stack.callback(module.register_forward_hook(keep(layer)).remove)
        yield found


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in their order."""
    stack = model.get_submodule(_stack_name(model))
    assert isinstance(stack, nn.ModuleList), f"decoder layers in a {type(stack).__name__}"
    return stack


def _stack_name(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers."""
    num_layers = model.config.num_hidden_layers
    return next(
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers
    )


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), f"the LM head of {type(model).__name__} is a {type(head).__name__}"
    return head


def load_student(config: StudentConfig, seed: int) -> Student:
    """Load (or initialise from `seed`) the student that `config` describes, in float32, on the CPU.

    New tokens that the folder's model does not have yet get their rows, with noise from `seed` (student/tokenizer.py).

    Errors: ValueError when a tensor is missing from the folder, is not part of the model or has another shape, when
    `layers` names a layer that is not there, when the model's logits are more than hidden @ head + bias, or when a new
    token cannot be one.
    """
    architecture = student_config(config)
    saved_dtype = architecture.dtype if isinstance(architecture.dtype, torch.dtype) else torch.float32
    random_weights = config.random_weights or config.stand_in
    if not random_weights and config.layers is None:
        model = _load_strictly(config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, attn_implementation=config.attention)
        if not random_weights and config.layers is not None:
            model = _cut(_load_strictly(config), config.layers, model)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_folder)
    if config.new_tokens:
        migrate(model, tokenizer, config.new_tokens, seed=seed)
    _check_head(model.eval())
    return Student(model.train(), tokenizer, saved_dtype)


def student_config(config: StudentConfig) -> PretrainedConfig:
    """The student's Hugging Face config, with `layers` applied; reads config.json only."""
    if not Path(config.model).exists():
        raise ValueError(f"student.model: found no file or folder {config.model!r}; expected a Hugging Face model folder")
    architecture = AutoConfig.from_pretrained(config.model)
    if config.stand_in:
        return _stand_in(architecture, config)
    if config.layers is None:
        return architecture
    num_layers = architecture.num_hidden_layers
    wrong = [layer for layer in config.layers if not 0 <= layer < num_layers]
    if wrong or not config.layers:
        raise ValueError(
            f"student.layers={list(config.layers)}: expected layers between 0 and {num_layers - 1}, because "
            f"{config.model!r} has {num_layers}"
        )
    for name, value in architecture.to_dict().items():  # lists with an entry per layer, such as layer_types
        if isinstance(value, list) and len(value) == num_layers:
            setattr(architecture, name, [value[layer] for layer in config.layers])
    architecture.num_hidden_layers = len(config.layers)
    return architecture


def _stand_in(architecture: PretrainedConfig, config: StudentConfig) -> PretrainedConfig:
    """A model of four values a token, but of the same vocabulary, positions and number of layers."""
    layers = architecture.num_hidden_layers if config.layers is None else len(config.layers)
    width = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    same = {name: getattr(architecture, name) for name in KEPT_IN_STAND_INS if hasattr(architecture, name)}
    return Qwen3Config(**width, **same, num_hidden_layers=layers)  # pyright: ignore[reportArgumentType]


def count_parameters(architecture: PretrainedConfig) -> int:
    """Parameters of a model with this config, tied ones once; allocates nothing."""
    return sum(parameter.numel() for parameter in on_meta(architecture).parameters())


def count_gathered_parameters(architecture: PretrainedConfig) -> int:
    """Of these, those that a worker with a share of the student (`train.parallel_strategy=fsdp`) has in whole at a time: all
    outside of the layers, and two layers, of which one computes while the other comes."""
    model = on_meta(architecture)
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
    return sum(parameter.numel() for parameter in model.parameters()) - sum(layers) + sum(sorted(layers)[-2:])


def on_meta(architecture: PretrainedConfig) -> PreTrainedModel:
    """A model of this config without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture)


def _load_strictly(config: StudentConfig) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  (its stub knows no loading info)
        config.model,
        dtype=torch.float32,
        attn_implementation=config.attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, and refused below with the others
    )
    problems = [f"{name}: {sorted(map(str, found))[:5]}" for name, found in report.items() if found]
    if problems:
        raise ValueError(
            f"{config.model!r} does not hold exactly the weights of {type(model).__name__}: {'; '.join(problems)}. Tensors "
            "that are missing would be random; take the complete checkpoint of this architecture"
        )
    return model


def _cut(whole: PreTrainedModel, layers: tuple[int, ...], model: PreTrainedModel) -> PreTrainedModel:
    """Fill `model`, which has only `len(layers)` layers, with those layers of `whole` and with all that is no layer."""
    stack = _stack_name(whole)
    weights = whole.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{stack}.")}
    for new, old in enumerate(layers):
        prefix = f"{stack}.{old}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        kept |= {f"{stack}.{new}.{name}": tensor for name, tensor in layer.items()}
    model.load_state_dict(kept, strict=True)
    return model


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Compare the model's own logits with the ones the losses will compute from hidden states and head."""
    input_ids = torch.arange(8)[None]  # several: the padding token's embedding is zero, and so is all that follows from it
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    plain = _head(model)(hidden)
    difference = (model(input_ids=input_ids, use_cache=False).logits - plain).abs().max().item()
    if not difference <= 1e-3 * plain.abs().max().item():
        raise ValueError(
            f"{type(model).__name__} does more to its logits than its LM head (they differ by {difference:.3g} from "
            "hidden @ head + bias): the losses would train another distribution; take a student without logit scaling or "
            "soft-capping"
        )
