"""Packed batches: where every token lands, and that it reads its own sequence and no other."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from small import SHAPES, small_config, tiny_llm
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
)

from constrained_ft.compose import compose
from constrained_ft.decoding import decode
from constrained_ft.llm import LLM
from constrained_ft.loading import load_llm, load_tokenizer
from constrained_ft.packing import Packed, Tree, pack
from constrained_ft.tiny import byte_tokenizer, tiny_model

TREES = [
    Tree(stem=(11, 12, 13), branches=((14, 15), (), (16, 17, 18, 19))),
    Tree(stem=(21,), branches=((22, 23),)),
    Tree(stem=tuple(range(31, 45))),
    Tree(stem=(51, 52), branches=((53,), (53,))),
]
SEQUENCES = [(*tree.stem, *branch) for tree in TREES for branch in tree.branches]


def read_by(packed: Packed, slot: int) -> list[int]:
    """The tokens that the token in a slot reads, in the order of their positions."""
    row, place = divmod(slot, packed.ids_BL.shape[1])
    seen_L = packed.mask_B1LL[row, 0, place]
    order = packed.position_BL[row][seen_L].argsort()
    return packed.ids_BL[row][seen_L][order].tolist()


@pytest.mark.parametrize("capacity", [1, 16, 24, 500])
@pytest.mark.parametrize("apart", [False, True])
def test_every_token_reads_its_own_sequence_up_to_itself(capacity: int, *, apart: bool) -> None:
    packed = pack(TREES, capacity, 0, apart=apart)
    assert len(packed.paths) == len(SEQUENCES)
    assert len(packed.stems) == len(TREES)
    for tree, slots in zip(TREES, packed.stems, strict=True):
        for place, slot in enumerate(slots.tolist()):
            assert read_by(packed, slot) == list(tree.stem[: place + 1])
    branches = [(tree.stem, branch) for tree in TREES for branch in tree.branches]
    for (stem, branch), slots in zip(branches, packed.paths, strict=True):
        assert len(slots) == len(branch) + 1
        for place, slot in enumerate(slots.tolist()):
            assert read_by(packed, slot) == [*stem, *branch[:place]]
            row, column = divmod(slot, packed.ids_BL.shape[1])
            assert packed.position_BL[row, column] == len(stem) + place - 1


def test_rows_are_filled_and_what_is_shared_is_stored_once() -> None:
    packed = pack(TREES, 24, 0)
    # 9, 3, 14 and 4 tokens: two rows of 14 and 9 + 4 + 3.
    assert packed.ids_BL.shape == (2, 16)
    assert sorted(packed.lengths_B.tolist()) == [14, 16]
    assert pack(TREES, 1, 0).ids_BL.shape[1] == 14  # the longest fits in any case
    apart = pack(TREES, 500, 0, apart=True)
    # A row for each branch, and one for the tree that has none.
    assert apart.ids_BL.shape == (len(SEQUENCES) + 1, 14)


def test_few_slots_of_usual_steps_are_padding() -> None:
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return (0,) * int(torch.randint(low, high, (), generator=generator))

    used = total = 0
    for _ in range(20):
        rollouts = [Tree(stem=ids(8, 32), branches=(ids(5, 20), ids(15, 20))) for _ in range(12)]
        corpus = [Tree(stem=ids(60, 128)) for _ in range(4)]
        packed = pack([*rollouts, *corpus], 256, 0)
        assert packed.ids_BL.shape[1] <= 256
        used += int(packed.lengths_B.sum())
        total += packed.ids_BL.numel()
    assert 1 - used / total < 0.035


def through_transformers(shape: str, sharpness_of: LLM) -> list[Tensor]:
    """Last hidden states of each sequence, alone, by transformers' plain attention."""
    module = tiny_model(shape, seed=0).eval()
    module.load_state_dict(sharpness_of.module.state_dict())
    module.set_attn_implementation("eager")
    with torch.no_grad():
        return [module.base_model(torch.tensor([s])).last_hidden_state[0] for s in SEQUENCES]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_batch_computes_what_its_sequences_would(shape: str) -> None:
    llm = tiny_llm(shape)
    packed = llm.pack(TREES)
    assert len(packed.ids_BL) == 1  # all of them side by side
    with torch.no_grad():
        states = llm.packed_states(packed)
    torch.testing.assert_close(llm.frozen().packed_states(packed), states, atol=0, rtol=0)
    for sequence, slots, expected in zip(
        SEQUENCES, packed.paths, through_transformers(shape, llm), strict=True
    ):
        branch = sequence[len(sequence) - len(slots) + 1 :]
        assert packed.ids_BL.flatten()[slots[1:]].tolist() == list(branch)
        torch.testing.assert_close(states[slots], expected[-len(slots) :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_models_that_cannot_pack_get_a_row_for_each_sequence(shape: str) -> None:
    llm = tiny_llm(shape)
    with torch.no_grad():
        packed = llm.pack(TREES)
        together = llm.packed_states(packed)[torch.cat(packed.paths)]
        llm.packs = False
        packed = llm.pack(TREES)
        assert len(packed.ids_BL) == len(SEQUENCES) + 1
        apart = llm.packed_states(packed)[torch.cat(packed.paths)]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_a_model_that_reads_across_a_row_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LLM.packed_inputs

    def careless(self: LLM, packed: Packed) -> dict[str, Tensor]:
        inputs = whole(self, packed)
        if self.packs:
            inputs["attention_mask"] = torch.ones_like(packed.ids_BL)
        return inputs

    monkeypatch.setattr(LLM, "packed_inputs", careless)
    assert not tiny_llm("llama").packs
    monkeypatch.undo()
    assert tiny_llm("llama").packs


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_default_model_is_packed(precision: str) -> None:
    config = compose([]).llm
    llm = load_llm(config, load_tokenizer(config), precision=precision, seed=0)
    assert llm.packs


WINDOWED: dict[str, Callable[..., PreTrainedConfig]] = {
    "mistral": MistralConfig,
    "gemma2": partial(Gemma2Config, final_logit_softcapping=None),
    "gemma3": partial(Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"]),
}


def windowed(name: str, window: int, folder: Path) -> LLM:
    """A tiny model some of whose layers read so many tokens back and no more."""
    torch.manual_seed(0)
    config = WINDOWED[name](
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=window,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # windows matter more where attention is sharp
        for parameter in module.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    llm = small_config().llm.model_copy(update={"model_name_or_path": str(folder)})
    return load_llm(llm, load_tokenizer(llm), precision="fp32", seed=0)


@pytest.mark.parametrize("window", [4, 24, 64])
@pytest.mark.parametrize("name", WINDOWED)
def test_sequences_that_fit_into_a_sliding_window_are_packed(
    name: str, window: int, tmp_path: Path
) -> None:
    llm = windowed(name, window, tmp_path)
    reference = llm.frozen()
    assert llm.packs == (window > 4)
    short = [Tree(stem=tuple(range(20, 28)), branches=((30, 31), (32, 33, 34))), Tree(stem=(5, 6))]
    long = [*short, Tree(stem=tuple(range(40, 80)))]
    for trees, fits in ((short, window > 4), (long, window == 64)):
        packed = llm.pack(trees)
        assert packed.apart != fits
        found_SD = reference.packed_states(packed)
        sequences = [tree.stem for tree in trees]
        slots = list(packed.stems)
        for branch, path in zip(short[0].branches, packed.paths, strict=True):
            sequences.append((*trees[0].stem, *branch))
            slots.append(torch.cat([packed.stems[0][:-1], path]))
        for ids, own in zip(sequences, slots, strict=True):
            with torch.no_grad():
                whole = llm.trunk(input_ids=torch.tensor([ids]), use_cache=False)
            wanted = whole.last_hidden_state[0]
            torch.testing.assert_close(found_SD[own], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [6, 64])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_model_with_a_window_decodes_what_it_predicts(
    name: str, window: int, tmp_path: Path
) -> None:
    llm = windowed(name, window, tmp_path).frozen()
    prompts = [tuple(range(20, 25)), tuple(range(30, 39))]
    uniforms_BT = torch.rand(6, 12, dtype=torch.float64, generator=torch.manual_seed(1))
    found = decode(llm, prompts, uniforms_BT)
    for row, (ids_T, mask_T) in enumerate(zip(found.ids_BT, found.mask_BT, strict=True)):
        prompt_ = prompts[row // 3]
        said = ids_T[mask_T].tolist()
        whole = llm.trunk(input_ids=torch.tensor([[*prompt_, *said[:-1]]]), use_cache=False)
        wanted = whole.last_hidden_state[0, len(prompt_) - 1 :]
        torch.testing.assert_close(found.hidden_BTD[row, mask_T], wanted, atol=2e-5, rtol=1e-4)
