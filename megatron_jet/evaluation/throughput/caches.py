"""Caches whose buffers stay where they are from one run to the next, for this project's models and for transformers'.

Speed needs that (nothing is copied to make room), and CUDA graphs demand it: they read and write fixed addresses.
"""

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from megatron_jet.configs.errors import UserError
from megatron_jet.convert.hf.cache import HybridCache, StateLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a transformers model, written in place into a buffer of the final length.

    The model sees a view of the tokens so far. With one query it needs no mask then, so SDPA runs its flash kernel.
    With transformers' own static cache it would read all of the buffer under a mask, and its dynamic cache copies all
    keys for every token; the peer model should have the best of both.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores [b, g, t, d] behind what is there; returns all so far [b, g, s, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.max_length, key_states.shape[-1])
            self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        end = self.length + key_states.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} tokens are more than the {self.max_length} that the cache has room for")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


class PinnedStateLayer(StateLayer):
    """A recurrent state whose value after prefill always lies at the same address, where decode graphs read it."""

    def __init__(self) -> None:
        super().__init__()
        self.pinning = False
        self.home: dict[str, Tensor] = {}

    def write(self, states: dict[str, Tensor], layout) -> None:
        super().write(states, layout)
        if not self.pinning:
            return
        if not self.home:
            self.home = self.tensors()
            return
        for name, x in self.tensors().items():
            self.home[name].copy_(x)
        self.replace(self.home)


def new_cache(config: PretrainedConfig, max_length: int) -> Cache:
    """An empty cache for sequences of up to `max_length` tokens.

    Raises:
        UserError: a transformers model with sliding windows, which has no such cache here.
    """
    if is_hybrid(config):
        cache = HybridCache(config, max_length)
        cache.layers = [PinnedStateLayer() if isinstance(x, StateLayer) else x for x in cache.layers]
        return cache
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError(
            f"{config.model_type}: its sliding windows cannot be timed; only models of this project's formats "
            "(jet_nemotron, megatron_jet) may have them"
        )
    return Cache(layers=[PreallocatedLayer(max_length) for _ in range(config.num_hidden_layers)])


def is_hybrid(config: PretrainedConfig) -> bool:
    """Whether the model is of this project's two formats."""
    return config.model_type in ("jet_nemotron", "megatron_jet")


def place(cache: Cache, tokens: int) -> None:
    """Makes the cache count `tokens` tokens, whatever its buffers hold, so that the next one goes behind them."""
    if isinstance(cache, HybridCache):
        cache.seen, cache.lengths, cache.last = tokens, None, None
        return
    for layer in cache.layers:
        layer.length = tokens


def rewind(cache: Cache) -> None:
    """Forgets all tokens and states; the buffers stay."""
    place(cache, 0)
    for layer in state_layers(cache):
        layer.replace({})


def pin(cache: Cache, pinning: bool) -> None:
    """Whether states are kept at their home address from here on."""
    for layer in state_layers(cache):
        layer.pinning = pinning


def go_home(cache: Cache) -> None:
    """Makes the pinned states the current ones."""
    for layer in state_layers(cache):
        layer.replace(layer.home)


def state_layers(cache: Cache) -> list[PinnedStateLayer]:
    """Layers with a recurrent state."""
    return [layer for layer in cache.layers if isinstance(layer, PinnedStateLayer)]


def addresses(cache: Cache) -> list[int]:
    """Where keys, values and pinned states lie."""
    found = []
    for layer in cache.layers:
        held = layer.home if isinstance(layer, PinnedStateLayer) else _tensors(layer)
        found += [x.data_ptr() for x in held.values()]
    return found


def cache_bytes(cache: Cache) -> int:
    """Bytes of all cached tensors, over the whole batch."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in _tensors(layer).values())


def _tensors(layer) -> dict[str, torch.Tensor]:
    if isinstance(layer, PreallocatedLayer):
        return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
    return layer.tensors()
