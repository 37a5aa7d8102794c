"""Layers that no adapter changes, against whole passes and transformers' own states of layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SHAPES, run, small_config, small_parts
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from constrained_ft import target as target_module
from constrained_ft.config import Config
from constrained_ft.finetune import backward_of_step, corpus_rows, update_llm
from constrained_ft.frozen_layers import StatesBelow, frozen_layers
from constrained_ft.llm import LLM
from constrained_ft.loading import load_llm
from constrained_ft.mining import prompts_to_sample
from constrained_ft.packing import Tree
from constrained_ft.parts import Parts
from constrained_ft.target import Target, build_target, learn_target, states_of
from constrained_ft.tiny import byte_tokenizer

TREES = [Tree(stem=(5, 6, 7, 8)), Tree(stem=(9, 10)), Tree(stem=(11, 12, 13))]


def loaded(config: Config) -> LLM:
    return load_llm(config.llm, byte_tokenizer(), precision="fp32", seed=1)


def moved(llm: LLM) -> LLM:
    """With adapters that say something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in llm.trained_parameters().values():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    return llm


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_of_a_pass_give_what_the_whole_gives(shape: str) -> None:
    llm = moved(
        loaded(small_config(f"llm.model_name_or_path=tiny:{shape}", lora=True, first_layer=1))
    )
    reference = llm.frozen()
    assert reference.has_frozen_layers
    packed = reference.pack(TREES)
    whole_SD = reference.packed_states(packed)
    below_SD = reference.states_below(packed)
    assert torch.equal(reference.packed_states(packed, below_SD), whole_SD)
    # The layers are there again, and adapters do not change what is below them.
    assert torch.equal(reference.packed_states(packed), whole_SD)
    base = llm.without_adapters()
    assert torch.equal(base.states_below(packed), below_SD)
    assert not torch.allclose(base.packed_states(packed), whole_SD, atol=1e-2)
    # What a layer gives according to transformers.
    with torch.no_grad():
        inputs = llm.packed_inputs(packed)
        between = llm.trunk(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(below_SD, between[1].flatten(0, 1), atol=1e-6, rtol=1e-6)


def test_there_are_none_where_the_first_layer_or_something_beside_them_is_trained() -> None:
    assert loaded(small_config(lora=True, first_layer=0)).frozen_layers is None
    assert loaded(small_config()).frozen_layers is None  # all weights
    trunk = loaded(small_config(lora=True, first_layer=1)).trunk
    assert frozen_layers(trunk) is not None
    trunk.get_parameter("embed_tokens.weight").requires_grad_()
    assert frozen_layers(trunk) is None


def test_a_model_whose_layers_hand_on_more_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = LlamaDecoderLayer.forward

    def forward(self: object, hidden_states: object, **others: object) -> object:
        first = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        states = inner(self, first, **others)
        is_last = self.self_attn.layer_idx == 1
        return states if is_last else (states, states)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    llm = loaded(small_config(lora=True, first_layer=1))
    assert llm.frozen_layers is None
    assert llm.frozen().packed_states(llm.pack(TREES)).isfinite().all()


@pytest.mark.parametrize("first_layer", [1, 2])
def test_a_trunk_that_takes_the_first_of_what_a_layer_gives(
    first_layer: int, tmp_path: Path
) -> None:
    settings = BloomConfig(vocab_size=257, hidden_size=64, n_layer=4, n_head=4)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = small_config(lora=True, first_layer=first_layer).llm
    llm = moved(
        load_llm(
            config.model_copy(update={"model_name_or_path": str(tmp_path)}),
            byte_tokenizer(),
            precision="fp32",
            seed=1,
        )
    ).frozen()
    packed = llm.pack(TREES)
    whole_SD = llm.packed_states(packed)
    if llm.has_frozen_layers:  # or every pass is whole
        assert torch.equal(llm.packed_states(packed, llm.states_below(packed)), whole_SD)


def test_what_was_kept_is_dropped_after_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    kept: list[StatesBelow] = []
    inner = target_module.build_target

    def watched(*arguments: object, **named: object) -> Target:
        alive.append(sum(len(one) > 0 for one in kept))
        return inner(*arguments, **named)  # type: ignore[arg-type]

    class Watched(StatesBelow):
        def __init__(self) -> None:
            super().__init__()
            kept.append(self)

    monkeypatch.setattr(target_module, "build_target", watched)
    monkeypatch.setattr(target_module, "StatesBelow", Watched)
    run(small_config(lora=True, first_layer=1), tmp_path)
    assert len(kept) == 3  # iterations; of the last LLM, no update reads the samples
    assert alive == [1, 1, 1, 0]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots that the first layer has read, pass by pass."""
    found: list[int] = []
    inner = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, **others: object) -> object:
        if self.self_attn.layer_idx == 0:
            found.append(hidden_states.shape[:2].numel())
        return inner(self, hidden_states, **others)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return found


def taught(config: Config) -> Parts:
    parts = small_parts(config)
    moved(parts.llm)
    learn_target(parts, config, parts.llm.frozen(), 1)
    return parts


def test_mining_reads_what_no_adapter_changes_once(reads: list[int]) -> None:
    config = small_config("prompts.candidates=3", lora=True, first_layer=1)
    parts, plain = taught(config), taught(config)
    plain.llm.frozen_layers = None
    reads.clear()
    for iteration in (2, 3, 4):
        reference = parts.llm.frozen()
        chosen = prompts_to_sample(parts, config, reference, iteration)
        assert chosen == prompts_to_sample(plain, config, plain.llm.frozen(), iteration)
        for one in (parts, plain):  # as an update does
            moved_a_little(one.llm)
    read_once = sum(len(prompt.token_ids) for prompt in parts.prompts.training)
    looked_at = [parts.prompts.of_iteration(i, 30, config.seed) for i in (2, 3, 4)]
    read_again = sum(len(prompt.token_ids) for some in looked_at for prompt in some)
    assert read_once + read_again <= sum(reads) <= 1.1 * (read_once + read_again)


def moved_a_little(llm: LLM) -> None:
    with torch.no_grad():
        for weight in llm.trained_parameters().values():
            weight.mul_(1.1)


def test_states_are_not_kept_of_more_prompts_than_come_up_again_soon() -> None:
    config = small_config(
        "prompts.prompts_per_iteration=2", "prompts.candidates=2", lora=True, first_layer=1
    )
    parts = taught(config)
    assert len(parts.prompts.training) > 8 * 4
    assert len(prompts_to_sample(parts, config, parts.llm.frozen(), 2)) == 2
    assert len(parts.states_below) == 0


def gradient(parts: Parts, target: Target, config: Config) -> torch.Tensor:
    rows_N = torch.arange(len(target.share_N))
    batches = corpus_rows(parts, config, 0)
    parts.optimization.optimizer.zero_grad()
    with parts.llm.training():
        losses = backward_of_step(parts.llm, target, rows_N, batches, config.trainer, 10.0)
    assert losses["update/kl"] > 1e-4  # there is something to compare
    gradients = [weight.grad for weight in parts.llm.trained_parameters().values()]
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)
    return torch.cat([one.flatten() for one in gradients if one is not None])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [("llama", "packed"), ("qwen2", "packed"), ("gemma", "packed"), ("llama", "apart")],
)
def test_an_update_begins_above_what_sampling_kept(shape: str, layout: str) -> None:
    config = small_config(
        f"llm.model_name_or_path=tiny:{shape}",
        "trainer.gradient_accumulation_steps=2",
        lora=True,
        first_layer=1,
    )
    parts = small_parts(config)
    moved(parts.llm)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    with torch.no_grad():  # an R with opinions
        for parameter in parts.auxiliary.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    if layout == "apart":
        parts.llm.packs = False  # each completion behind a copy of its prompt
    target = replace(
        build_target(parts.replay[0], parts.auxiliary.frozen(), target.reference.head, config),
        below=target.below,
    )
    assert target.below is not None
    whole = replace(target, below=None)
    reference = parts.llm.frozen()
    states_NTD = states_of(reference, target.rollouts, target.below)
    mask_NT = target.rollouts.mask_NT
    torch.testing.assert_close(
        states_NTD[mask_NT], states_of(reference, target.rollouts)[mask_NT], atol=1e-5, rtol=1e-5
    )
    found, wanted = gradient(parts, target, config), gradient(parts, whole, config)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    # It does read what was kept.
    with pytest.raises(KeyError):
        gradient(parts, replace(target, below=StatesBelow()), config)


def test_in_bfloat16_reference_and_update_begin_with_the_same_numbers() -> None:
    config = small_config("trainer.precision=bf16", lora=True, first_layer=1)
    parts = small_parts(config)
    moved(parts.llm)
    assert parts.llm.begins_above
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    fresh = target.with_reference(parts.llm.frozen())
    whole = replace(target, below=None).with_reference(parts.llm.frozen())
    mask_NT = target.rollouts.mask_NT
    states = [one.reference.hidden_NTD[mask_NT].float() for one in (fresh, whole)]
    gap = (states[0] - states[1]).norm() / states[1].norm()
    assert 0 < gap < 0.02  # other states below by what rounding does, and no more
    found, wanted = (gradient(parts, one, config) for one in (fresh, whole))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_frozen_layers_read_a_completion_once(reads: list[int]) -> None:
    config = small_config(lora=True, first_layer=1)
    parts = taught(config)
    target = learn_target(parts, config, parts.llm.frozen(), 2)
    corpus = [corpus_rows(parts, config, step) for step in range(2, 4)]
    reads.clear()
    update_llm(parts, target, config, 2)
    tokens = sum(len(row.token_ids) for step in corpus for rows in step[0] for row in rows)
    assert tokens <= sum(reads) <= 1.2 * tokens


# With an overlapped target, a checkpoint would not have what was kept.
@pytest.mark.parametrize("override", ["trainer=overlapped", "sampler=hf"])
def test_updates_read_all_layers_of_what_is_not_kept(override: str) -> None:
    config = small_config(override, lora=True, first_layer=1)
    parts = small_parts(config)
    assert parts.llm.begins_above
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    assert target.below is None
    assert update_llm(parts, target, config, 1)["update/ce"] > 0


def test_updates_read_all_layers_where_these_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, **others: object) -> object:
        states = inner(self, hidden_states, **others)
        return torch.nn.functional.dropout(states, 0.2, self.training)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    llm = loaded(small_config(lora=True, first_layer=1))
    assert llm.frozen().has_frozen_layers  # mining does not train
    assert not llm.begins_above


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_updates_that_compute_activations_twice_read_all_layers() -> None:
    config = small_config(lora=True, first_layer=1)
    parts = small_parts(config)
    moved(parts.llm)
    kept = learn_target(parts, config, parts.llm.frozen(), 1)
    assert kept.below is not None
    wanted = gradient(parts, replace(kept, below=None), config)
    parts.llm.checkpoint_activations()
    assert learn_target(parts, config, parts.llm.frozen(), 2).below is None
    torch.testing.assert_close(gradient(parts, kept, config), wanted, atol=1e-7, rtol=1e-4)
