"""The kernel and the cache for CPUs, against transformers' own."""

from typing import Any

import pytest
import torch
from small import SHAPES, tiny_llm
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from constrained_ft.attention import GROUPED, GrowingLayer, grouped_attention, grow_in_place
from constrained_ft.errors import ModelError
from constrained_ft.tiny import tiny_model

IDS = torch.arange(1, 25).view(3, 8) * 7 % 257
MASK = torch.ones(3, 8, dtype=torch.long)
MASK[0, :5] = 0  # on the left, as when decoding


def outcome(module: PreTrainedModel, kernel: str) -> tuple[Tensor, list[Tensor]]:
    """Logits at real tokens, and the gradients of a sum of squares."""
    module.set_attn_implementation(kernel)
    module.zero_grad()
    positions = (MASK.cumsum(-1) - 1).clamp_min(0)
    logits = module(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits[MASK.bool()]
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_plain_attention_does(shape: str) -> None:
    module = tiny_model(shape, seed=0).eval()
    expected, expected_gradients = outcome(module, "eager")
    found, gradients = outcome(module, GROUPED)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(gradients) == len(expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_its_own_scale_mask_and_dropout_count() -> None:
    layer = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 5, 8, generator=generator) for n in (6, 3, 3))
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :, 3:] = -1e9
    output, _ = grouped_attention(layer, query, key, value, mask, scaling=0.7)
    repeated = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask, scale=0.7
    )
    torch.testing.assert_close(output.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    capped, _ = grouped_attention(layer, query * 9, key, value, mask, scaling=0.7, softcap=2.0)
    scores = query * 9 @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    weights = (2.0 * torch.tanh(scores / 2.0) + mask).softmax(-1)
    by_hand = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(capped.transpose(1, 2), by_hand, atol=1e-5, rtol=1e-5)
    still, _ = grouped_attention(layer.eval(), query, key, value, None, dropout=0.5)
    plain, _ = grouped_attention(layer, query, key, value, None)
    assert torch.equal(still, plain)
    dropped, _ = grouped_attention(layer.train(), query, key, value, None, dropout=0.5)
    assert not torch.allclose(dropped, plain)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_attention_of_another_kind_is_refused(name: str) -> None:
    heads = torch.zeros(1, 1, 2, 4)
    others: dict[str, Any] = {name: torch.tensor(30.0)}
    with pytest.raises(
        ModelError, match=rf"attention for {name}, which .*attn_implementation=eager"
    ):
        grouped_attention(torch.nn.Identity(), heads, heads, heads, None, **others)


def decode(shape: str, *, growing: bool, tokens: int) -> tuple[Tensor, DynamicCache]:
    """Hidden states of each new token; the rows are repeated after the first forward pass."""
    llm = tiny_llm(shape).frozen()
    mask = torch.ones(6, 8, dtype=torch.long)
    with torch.no_grad():
        _, cache = llm.read(IDS, mask[:3])
        if growing:
            grow_in_place(cache)
        cache.batch_repeat_interleave(2)
        found = []
        for step in range(tokens):
            new = (torch.arange(6)[:, None] * 13 + step) % 257
            mask = torch.cat([mask, mask[:, :1]], 1)
            found.append(llm.read(new, mask, cache)[0])
            if step == tokens // 2:
                kept = torch.tensor([5, 0, 2, 1, 4, 3])
                cache.batch_select_indices(kept)
    return torch.stack(found), cache


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_that_grows_in_place_holds_what_one_that_is_copied_does(shape: str) -> None:
    expected, copied = decode(shape, growing=False, tokens=25)
    found, grown = decode(shape, growing=True, tokens=25)
    assert torch.equal(found, expected)
    assert all(isinstance(layer, GrowingLayer) for layer in grown.layers)
    for ours, theirs in zip(grown.layers, copied.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_new_token_is_written_behind_the_others() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 0)
    grow_in_place(cache)
    places = set()
    for _ in range(5):
        keys, _ = cache.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
        places.add(keys.data_ptr())
    assert len(places) == 1
    assert keys.shape == (1, 1, 9, 2)
    assert cache.get_seq_length() == 9


def test_other_caches_stay_as_they_are() -> None:
    layer = DynamicSlidingWindowLayer(sliding_window=4)
    cache = DynamicCache()
    cache.layers = [layer]
    grow_in_place(cache)
    assert cache.layers == [layer]
    grow_in_place(None)
