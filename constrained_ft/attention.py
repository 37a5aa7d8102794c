"""Attention for short sequences on CPUs: keys and values are neither repeated nor moved.

Shape suffixes:  B sequences, H query heads, G key and value heads (H / G queries share one), T new
positions, S positions so far, D width of a head.

transformers' own kernels copy each key and value head once for every query head that shares it, and
its cache copies everything once more for every new token. At 40 positions these copies take longer
than the attention itself. What is computed is the same.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import eager_mask

from constrained_ft.errors import ModelError

GROUPED = "cft_grouped"
"""The name under which transformers knows `grouped_attention`."""

_FOREIGN = ("s_aux", "position_bias")


def grouped_attention(  # noqa: PLR0913
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S D"],
    attention_mask: Float[Tensor, "#B 1 T S"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """softmax(q k^T scaling + mask) v, the signature being that of transformers' kernels.

    Args:
        module: the attention layer.
        query: rotated already where the model rotates.
        key: all positions so far.
        value: all positions so far.
        attention_mask: added to the scores; None attends to everything.
        scaling: of the scores; None is 1 / sqrt(D).
        dropout: share of attention weights dropped.
        softcap: c of scores that are capped to c tanh(score / c), as in Gemma 2.
        others: what models with another attention ask for.

    Raises:
        ModelError: for a model whose attention is not this one (sinks, biases).
    """
    foreign = [name for name in _FOREIGN if others.get(name) is not None]
    if foreign:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(foreign)}, which the "
            "kernel for CPUs does not know; set llm.attn_implementation=eager"
        )
    rows, heads, steps, width = query.shape
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    # The queries that share a head follow one another: one product serves them all.
    scores = (query * scale).reshape(rows, groups, -1, width) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        shared = scores.view(rows, groups, heads // groups, steps, -1)
        scores = (shared + attention_mask[:, :, None]).view_as(scores)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = (weights @ value).view(rows, heads, steps, width)
    return output.transpose(1, 2).contiguous(), None


class GrowingLayer(DynamicLayer):
    """One layer of the cache: a new token is written behind the others, which stay in place."""

    _room: tuple[Tensor, Tensor] | None = None
    """Where keys and values lie, with space behind them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the new positions; returns keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        length = self.get_seq_length()
        total = length + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < total:
            self._room = (_with_room(self.keys, total), _with_room(self.values, total))
        keys, values = self._room
        keys[:, :, length:total] = key_states
        values[:, :, length:total] = value_states
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return keys[:, :, :total], values[:, :, :total]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        super().batch_select_indices(indices)
        self._room = None


def _with_room(past_BGSD: Tensor, total: int) -> Tensor:
    """A copy with room for `total` positions and as many again."""
    rows, groups, length, width = past_BGSD.shape
    roomy = past_BGSD.new_empty(rows, groups, 2 * total, width)
    roomy[:, :, :length] = past_BGSD
    return roomy


def grow_in_place(cache: object) -> None:
    """Let a filled cache take new tokens without moving the old ones.

    Layers that are no plain attention, and caches that are not transformers' own, stay as they are.
    """
    if not isinstance(cache, DynamicCache):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            grown = GrowingLayer()  # type: ignore[no-untyped-call]
            grown.update(layer.keys, layer.values)
            cache.layers[index] = grown


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)
