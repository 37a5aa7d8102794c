"""What a loaded model can do, tried out on a few tokens.

Architectures are too many to keep a list of: whether one keeps packed sequences apart, or can be
run in two parts, is read off its own numbers.

Shape suffixes:  B sequences, L token positions, D hidden width, V vocabulary, S slots of a batch.
"""

from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from constrained_ft.encoding import pad_id
from constrained_ft.errors import ModelError
from constrained_ft.frozen_layers import FrozenLayers, frozen_layers
from constrained_ft.llm import LLM, right_padded_inputs
from constrained_ft.packing import Tree, pad_right
from constrained_ft.randomness import seed_everything

_STRIDE = 37  # between the token ids

# Settings by which models change their logits behind the head, and what leaves them as they are.
_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


def tried_out(llm: LLM) -> LLM:
    """Let a new LLM do what it can: pack sequences, begin above its frozen layers.

    Args:
        llm: changed and returned.

    Raises:
        ModelError: when it changes its logits behind the head.
    """
    _check_head(llm)
    llm.packs = _can_pack(llm)
    llm.frozen_layers = _run_apart(llm, frozen_layers(llm.trunk))
    llm.still_below = _are_still(llm)
    return llm


@torch.no_grad()
def _check_head(llm: LLM) -> None:
    """Refuse models that change logits behind the head (softcap, scale): the KL would be wrong.

    By their settings, as a cap may do nothing to the logits of a few tokens, and by trying it out.
    """
    text = llm.module.config.get_text_config()
    for name, neutral in _TRANSFORMS.items():
        value = getattr(text, name, None)
        if value is not None and value != neutral:
            _refuse_head(llm, f"{name}={value:g}")
    ids_BL, lengths_B = pad_right([_sequences(llm)[0][:4]], pad_id(llm.tokenizer), llm.device)
    with llm.autocast():
        own_BLV = llm.module(**right_padded_inputs(ids_BL, lengths_B)).logits.float()
    ours_BLV = llm.head(llm.hidden_states(ids_BL, lengths_B))
    gap = (own_BLV - ours_BLV).abs().max() / own_BLV.abs().max().clamp_min(1e-6)
    if not gap < (0.05 if llm.bf16 else 1e-3):
        _refuse_head(llm, f"relative difference {gap:.2g}")


def _refuse_head(llm: LLM, how: str) -> NoReturn:
    raise ModelError(
        f"{type(llm.module).__name__} transforms its logits after the output head ({how}), which "
        "is not supported; use a model with a plain linear head"
    )


@torch.no_grad()
def _can_pack(llm: LLM) -> bool:
    """Whether the model keeps the sequences of one row apart, tried out on a few tokens."""
    first, second = _sequences(llm)
    trees = [
        Tree(stem=first, branches=(second[:4], second[4:])),
        Tree(stem=second, branches=(first,)),
    ]
    llm.packs = True
    packed = llm.pack(trees)
    if packed.apart:
        return False  # a window of a few tokens
    try:
        together = llm.packed_states(packed)[torch.cat(packed.paths)]
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False  # flash attention, for one, takes no such mask
    llm.packs = False
    packed = llm.pack(trees)
    apart = llm.packed_states(packed)[torch.cat(packed.paths)]
    return _agree(llm, together, apart)


@torch.no_grad()
def _run_apart(llm: LLM, layers: FrozenLayers | None) -> FrozenLayers | None:
    """Layers that the model gives the same states without, tried out on a few tokens."""
    if layers is None:
        return None
    packed = llm.pack([Tree(stem=ids) for ids in _sequences(llm)])
    whole_SD = llm.packed_states(packed)
    try:
        states_BLD = layers.alone(lambda: llm.packed_states(packed))
        with layers.replaced_by(states_BLD):
            parts_SD = llm.packed_states(packed)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return None  # layers that hand on more than one state, for one
    real_S = torch.cat(packed.stems).to(llm.device)
    return layers if _agree(llm, parts_SD[real_S], whole_SD[real_S]) else None


def _are_still(llm: LLM) -> bool:
    """Whether training changes nothing about the frozen layers: drops no number, and no layer."""
    if llm.frozen_layers is None or getattr(llm.module.config, "layerdrop", 0.0) > 0:
        return False
    packed = llm.pack([Tree(stem=ids) for ids in _sequences(llm)])
    real_S = torch.cat(packed.stems).to(llm.device)
    before_SD = llm.states_below(packed)
    with seed_everything(0), llm.training():
        meanwhile_SD = llm.states_below(packed)
    return _agree(llm, meanwhile_SD[real_S], before_SD[real_S])


def _agree(llm: LLM, states_SD: Float[Tensor, "S D"], right_SD: Float[Tensor, "S D"]) -> bool:
    """Whether states differ by rounding alone."""
    gap = (states_SD - right_SD).float().norm() / right_SD.float().norm().clamp_min(1e-6)
    return bool(gap < (0.05 if llm.bf16 else 1e-3))


def _sequences(llm: LLM) -> list[tuple[int, ...]]:
    """Two sequences of 8 and 12 tokens out of the middle of the vocabulary.

    There are words, mostly. The first ids are often marks such as those of a chat's turns: there
    bfloat16 states are half noise, which differs with the layout of a batch.
    """
    size = len(llm.head.weight_VD)
    ids = [(size // 2 + _STRIDE * i) % size for i in range(20)]
    return [tuple(ids[:8]), tuple(ids[8:])]
