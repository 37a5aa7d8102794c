"""How much memory a run will need, and how much it took."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small import SHAPES, small_config, small_parts, tiny_llm
from torch.profiler import ProfilerActivity, profile

from constrained_ft import memory
from constrained_ft.distributed import StopRequest
from constrained_ft.memory import (
    activation_bytes,
    estimate_memory,
    held_memory,
    memory_line,
    memory_words,
    peak_during,
    peak_memory,
    spare_memory,
    update_fits,
)
from constrained_ft.packing import Tree
from constrained_ft.parts import build_parts
from constrained_ft.progress import Silent


def test_memory_beside_its_estimate() -> None:
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    held = torch.ones(peak // 4 + 2**24)  # more than ever before
    assert peak_memory(torch.device("cpu")) > peak
    del held
    assert memory_line(2 * 2**30, 3 * 2**30) == (
        "memory: 2.0 GiB at the peak, 3.0 GiB estimated (+50%)"
    )
    assert "does not tell" in memory_line(None, 2**30)


@pytest.mark.parametrize(
    ("setting", "spare", "twice"),
    [
        ("auto", 2**20, True),
        ("auto", 2**40, False),
        ("auto", None, False),
        ("false", 2**20, False),
        ("true", 2**40, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_activations_are_computed_twice_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, setting: str, spare: int | None, *, twice: bool
) -> None:
    monkeypatch.setattr(memory, "spare_memory", lambda _: spare)
    config = small_config(f"llm.gradient_checkpointing={setting}")
    parts = build_parts(config, Silent(), StopRequest())
    assert parts.llm.checkpoints == twice
    assert memory_words(parts.llm, 2**31) == "about 2.0 GiB" + (
        ", activations computed twice" if twice else ""
    )


def test_what_a_tensor_takes_is_held_and_no_longer_spare() -> None:
    cpu = torch.device("cpu")
    held, spare = held_memory(cpu), spare_memory(cpu)
    assert held is not None
    assert spare is not None
    tensor = torch.ones(2**28)
    now = held_memory(cpu)
    assert now is not None
    assert abs(now - held - 4 * len(tensor)) < 2**28
    assert spare_memory(cpu) != spare


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes that the allocator gave out and did not take back, by torch's profiler."""
    found: list[int] = []
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as seen:
        yield found
    found.append(sum(event.self_cpu_memory_usage for event in seen.key_averages()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_what_the_allocator_gave_out(shape: str, *, lora: bool) -> None:
    llm = tiny_llm(shape, lora=lora)
    counted = activation_bytes(llm)
    packed = llm.pack([Tree(stem=tuple(range(32)))] * 32)
    with llm.training(), allocations() as found:
        states_SD = llm.packed_states(packed)
    assert len(states_SD) == packed.ids_BL.numel() >= 1024
    assert counted == pytest.approx(found[0] / len(states_SD), rel=0.1)


def test_ranks_that_divide_the_weights_need_less_each(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("llm.lora=null")
    parts = small_parts(config)

    def needs(shards: int) -> int:
        """The least spare memory that is enough, in bytes."""
        enough, short = 2**40, 0
        while enough - short > 1:
            middle = (enough + short) // 2
            monkeypatch.setattr(memory, "spare_memory", lambda _, spare=middle: spare)
            if update_fits(parts.llm, parts.prompts, config, shards):
                enough = middle
            else:
                short = middle
        return enough

    trained = sum(p.numel() for p in parts.llm.trained_parameters().values())
    # Of each number: the weight, its gradient and two moments, float32; a fifth is kept free.
    saved = (needs(1) - needs(4)) * memory._USABLE
    assert saved == pytest.approx(0.75 * 16 * trained, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_activations_are_counted_where_they_are_computed_twice() -> None:
    llm = tiny_llm()
    counted = activation_bytes(llm)
    llm.checkpoint_activations()
    assert activation_bytes(llm) == counted
    packed = llm.pack([Tree(stem=tuple(range(32)))] * 32)
    with llm.training(), allocations() as found:
        states_SD = llm.packed_states(packed)
    assert found[0] / len(states_SD) < counted / 3


def test_the_peak_of_a_piece_of_work_forgets_what_was_before() -> None:
    cpu = torch.device("cpu")
    before = torch.ones(2**28)
    del before
    held = held_memory(cpu)
    peak = peak_during(lambda: torch.ones(2**26), cpu)
    assert held is not None
    assert peak is not None
    assert abs(peak - held - 2**28) < 2**26


@pytest.mark.parametrize("overrides", [[], ["trainer.kl_weight=0"], ["trainer.corpus=false"]])
@pytest.mark.parametrize("lora", [False, True])
def test_an_estimate_changes_nothing(overrides: list[str], *, lora: bool) -> None:
    config = small_config(*overrides, lora=lora)
    parts = small_parts(config)
    weights = {name: p.clone() for name, p in parts.llm.module.named_parameters()}
    random, held = torch.get_rng_state(), held_memory(parts.llm.device)
    estimate = estimate_memory(parts.llm, parts.prompts, config)
    assert estimate is not None
    assert held is not None
    assert estimate > held
    # What measuring the base model took counts where it is the most.
    more = estimate_memory(parts.llm, parts.prompts, config, evaluation=2**33)
    assert more is not None
    held = min(held, held_memory(parts.llm.device) or held)  # the allocator may give some back
    assert held + 2**33 <= more < held + 2**34
    assert torch.equal(torch.get_rng_state(), random)
    assert not parts.llm.module.training
    for name, parameter in parts.llm.module.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, weights[name])


def test_an_update_is_reckoned_where_its_peak_cannot_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config("trainer.per_device_train_batch_size=4", "data.max_length=128")
    parts = small_parts(config)
    monkeypatch.setattr(memory, "peak_during", lambda *_: None)
    monkeypatch.setattr(memory, "peak_memory", lambda _: 0)
    held = held_memory(parts.llm.device)
    estimate = estimate_memory(parts.llm, parts.prompts, config)
    assert estimate is not None
    assert held is not None
    assert estimate - held > 512 * activation_bytes(parts.llm)
