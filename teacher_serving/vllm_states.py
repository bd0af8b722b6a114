"""Hidden states out of vLLM: the settings that keep them, the connector that hands them over, and what then arrives.

In:  layers, counted from 0; a finished request.
Out: states [L, P + T, H] as `arrow.shipped_states` has them.

vLLM can write the output of chosen layers into a part of its KV cache, next to the keys and values of the same tokens
(`extract_hidden_states`, made for training draft models). So they are there after chunked prefill, preemption and a hit
in the prefix cache as well. When a request is done, and before its blocks are freed, a connector may look at them: ours
sends them along with the request's last output. Nothing is written to a file, nothing stays behind.

vLLM takes it for speculative decoding, with the token just sampled as the guess for the next one. Such guesses cost a
second token of every sequence in every step, and what is sampled beside them depends on the batch: our scheduler drops
them.

Shape letters: P prompt tokens, T output tokens, L shipped layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.outputs import RequestOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus

from teacher_serving.arrow import NO_STATES, half_states, shipped_states

ANSWERED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def settings_for_states(layers: Sequence[int]) -> dict[str, Any]:
    """Arguments of vLLM's engine with which it keeps and sends the output of these layers; none for no layers."""
    if not layers:
        return {}
    after = [layer + 1 for layer in layers]  # vLLM's 0 is the embedding
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": after}},
        },
        "scheduler_cls": StatesScheduler,
        "async_scheduling": False,
        "kv_transfer_config": {
            "kv_connector": StatesConnector.__name__,
            "kv_connector_module_path": StatesConnector.__module__,
            "kv_role": "kv_producer",
        },
    }


def received_states(output: RequestOutput, layers: Sequence[int], num_tokens: int) -> np.ndarray:
    """States [L, num_tokens, H] that came with a finished request of P + T = num_tokens; NO_STATES for no layers."""
    if not layers:
        return NO_STATES
    sent = output.kv_transfer_params
    assert sent is not None, "the request came without states"
    return shipped_states(np.frombuffer(sent["states"], np.float16).reshape(sent["shape"]), num_tokens)


class StatesScheduler(Scheduler):
    """vLLM's scheduler without the guesses: a step computes one token of a sequence that is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A schedule of guesses by batch size, if only of one guess for any size, keeps vLLM from giving a sequence that
        # begins with one token a made-up guess.
        self.dynamic_sd_lookup = [1] * (self.max_num_running_reqs + 1)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Drop them."""


class StatesConnector(KVConnectorBase_V1, SupportsHMA):
    """What vLLM asks at the end of a request: sends the states of its tokens. Moves no keys and values anywhere."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        layers = get_layers_from_vllm_config(vllm_config, CacheOnlyAttentionLayer)
        assert len(layers) == 1, f"expected the one layer that keeps states in this process, found {sorted(layers)}"
        ((name, self._layer),) = layers.items()
        groups = kv_cache_config.kv_cache_groups
        (self._group,) = (index for index, group in enumerate(groups) if name in group.layer_names)
        self._block_tokens = groups[self._group].kv_cache_spec.block_size

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The states of all tokens that the model has read, for the request's last output. Never delays its blocks."""
        if request.status not in ANSWERED:
            return False, None
        cache = self._layer.kv_cache  # [blocks, L, tokens of a block, H]
        assert cache.shape[2] == self._block_tokens, f"blocks of {cache.shape[2]} tokens, planned {self._block_tokens}"
        if cache.is_cuda:
            torch.cuda.synchronize(cache.device)  # the step that kept the last ones may still run
        blocks = torch.tensor(block_ids[self._group], device=cache.device)
        states = cache[blocks].transpose(0, 1).flatten(1, 2)[:, : request.num_tokens - 1]
        half = half_states(states.cpu().float().numpy())
        return False, {"states": half.tobytes(), "shape": half.shape}

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """None: nothing is loaded."""
        return 0, False

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Nothing to tell the worker."""
        return KVConnectorMetadata()

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
