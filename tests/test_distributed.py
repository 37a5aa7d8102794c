"""Several ranks do what one does: the same gradients, the same weights, the same end."""

import ctypes
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from several import together
from small import gradients, small_config, small_parts
from torch import Tensor

from constrained_ft import finetune, fit
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest, World, default_device, pack, unpack
from constrained_ft.errors import CftError, DivergedError, Interrupted, PeerError, ScorerError
from constrained_ft.finetune import backward_of_step, fault_of_step
from constrained_ft.fit import Examples
from constrained_ft.heartbeat import Heartbeat
from constrained_ft.parts import Parts, shard_llm
from constrained_ft.randomness import seed_everything
from constrained_ft.target import Target, learn_target


def test_an_accelerator_without_float64_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    for name, used in (("mps", "cpu"), ("cuda", "cuda:0")):
        found = torch.device(name)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found: found)
        assert str(default_device()) == used


# What ranks run; spawned processes import it from here -------------------------------------------


def exchanges(world: World, stop: StopRequest) -> dict[str, object]:
    own = torch.arange(4.0) * (world.rank + 1)
    whole = torch.full((2, 3), float(world.rank), dtype=torch.float64)
    world.add([own, whole])
    copied = torch.full((3,), float(world.rank))
    world.copy([copied], source=1)
    return {
        "sum": own.tolist(),
        "other": whole.tolist(),
        "totals": world.totals([1.0, world.rank / 3]),
        "gathered": world.gather(b"x" * (world.rank + 1)),
        "told": world.tell(f"from {world.rank}".encode(), source=1),
        "copied": copied.tolist(),
        "share": list(world.share(range(5))),
    }


def fail_on_one(world: World, stop: StopRequest, rank: int) -> None:
    world.totals([1.0])
    if world.rank == rank:
        raise ScorerError("the scorer is gone")
    for _ in range(100):
        world.totals([1.0])


def break_on_one(world: World, stop: StopRequest) -> None:
    if world.rank == 1:
        raise ZeroDivisionError("by zero")
    world.totals([1.0])


def signal_one(world: World, stop: StopRequest) -> None:
    for number in range(1000):
        if number == 5 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        world.totals([1.0])


def come_late(world: World, stop: StopRequest) -> None:
    if world.rank == 1:
        time.sleep(2)
        return
    world._links = replace(world._links, timeout=0.5)  # type: ignore[type-var]
    world.totals([1.0])


def freeze_one(world: World, stop: StopRequest, how: str) -> None:
    """One rank freezes in its sampling; the other, which waits for it, wakes it in the end."""
    world.begin("sampling")
    pid = int(world.gather(str(os.getpid()).encode())[1])
    assert world._links is not None
    heartbeat = world._links.heartbeat
    heartbeat.silence, heartbeat.factor = 1.5, 0
    time.sleep(2)  # each has given a sign of life by now
    if world.rank == 1 and how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    elif world.rank == 1 and how == "stopped in an exchange":
        agree = world.agree

        def agree_and_stop() -> None:
            agree()
            os.kill(pid, signal.SIGSTOP)

        world.agree = agree_and_stop  # type: ignore[method-assign]
    elif world.rank == 1:
        ctypes.PyDLL(None).sleep(6)  # unlike CDLL, it keeps the interpreter's lock
    try:
        world.totals([1.0])
    finally:
        os.kill(pid, signal.SIGCONT)


def work_for_long(world: World, stop: StopRequest) -> None:
    assert world._links is not None
    heartbeat = world._links.heartbeat
    heartbeat.silence, heartbeat.factor = 1.5, 20
    if world.rank == 1:
        time.sleep(5)
    world.totals([1.0])


def gradients_in_float64(
    world: World, stop: StopRequest, overrides: tuple[str, ...], rows: int
) -> dict[str, Tensor]:
    config = small_config(*overrides)
    return step_in_float64(config, world, rows)[0]


def nan_on_one(world: World, stop: StopRequest) -> str | None:
    config = small_config()
    usual = finetune._backward_of_pass

    def backward(*arguments: object, **named: object) -> tuple[float, float]:
        ce, kl = usual(*arguments, **named)  # type: ignore[arg-type]
        return ce, float("nan") if world.rank == 1 else kl

    finetune._backward_of_pass = backward
    _, numbers = step_in_float64(config, world, 8)
    return fault_of_step(numbers, 1.0, config.guard, 3)


def step_in_float64(
    config: Config, world: World, rows: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One step's gradients and numbers, of parts and a target that every rank builds alike."""
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    parts.llm.module.double()
    target = doubled(target, parts)
    parts.world = world
    shard_llm(parts, config)
    numbers = backward_of_step(
        parts.llm,
        target,
        torch.arange(rows),
        finetune.corpus_rows(parts, config, 3),
        config.trainer,
        float(target.share_N[:rows].sum()),
        world=world,
    )
    return gradients(parts.llm), numbers


def doubled(target: Target, parts: Parts) -> Target:
    table = replace(
        target.table,
        tokens_JVR=target.table.tokens_JVR.double(),
        prior_JV=target.table.prior_JV.double(),
    )
    reference = replace(
        target.reference,
        hidden_NTD=target.reference.hidden_NTD.double(),
        head=parts.llm.head.frozen(),
    )
    return replace(
        target,
        table=table,
        reference=reference,
        factors_NTJR=target.factors_NTJR.double(),
        offset_NTJ=target.offset_NTJ.double(),
        floor_N=target.floor_N.double(),
        weights_NT=target.weights_NT.double(),
        share_N=target.share_N.double(),
    )


# Exchanges ---------------------------------------------------------------------------------------


def test_exchanges_give_every_rank_the_same() -> None:
    first, second, third = together(exchanges, 3)
    assert first["sum"] == second["sum"] == [0.0, 6.0, 12.0, 18.0]
    assert first["other"] == [[3.0] * 3] * 2
    assert first["totals"] == [3.0, 1.0]
    assert first["gathered"] == third["gathered"] == [b"x", b"xx", b"xxx"]
    assert first["told"] == second["told"] == b"from 1"
    assert first["copied"] == third["copied"] == [1.0] * 3
    assert [first["share"], second["share"], third["share"]] == [[0, 3], [1, 4], [2]]


def test_alone_nothing_is_exchanged() -> None:
    world = World.alone()
    tensor = torch.ones(2)
    world.add([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert world.totals([2.0]) == [2.0]
    assert world.gather(b"x") == [b"x"]
    assert world.tell(b"x") == b"x"
    assert world.leads


def test_a_packet_holds_tensors_and_json() -> None:
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    again, facts = unpack(pack(tensors, {"x": [1, None, "é"]}))
    assert facts == {"x": [1, None, "é"]}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert unpack(pack({}, None)) == ({}, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_reaches_the_other_with_its_kind_and_rank(rank: int) -> None:
    found = together(fail_on_one, 2, rank)
    assert [type(one) for one in found] == [ScorerError, ScorerError]
    assert str(found[rank]) == "the scorer is gone"
    assert str(found[1 - rank]) == f"rank {rank}: the scorer is gone"


def test_an_unexpected_error_is_a_general_one_elsewhere() -> None:
    first, second = together(break_on_one, 2)
    assert type(first) is CftError
    assert str(first) == "rank 1: ZeroDivisionError: by zero"
    assert isinstance(second, ZeroDivisionError)


def test_a_signal_to_one_rank_stops_both() -> None:
    found = together(signal_one, 2)
    assert [type(one) for one in found] == [Interrupted, Interrupted]
    assert "SIGTERM" in str(found[0])


def test_a_rank_that_does_not_come_is_named() -> None:
    first, second = together(come_late, 2)
    assert isinstance(first, PeerError)
    assert "rank 1 did not come within 0.5 s" in str(first)
    assert second is None


@pytest.mark.parametrize(
    "how", ["stopped", "stopped in an exchange", "holding the interpreter's lock"]
)
def test_a_frozen_rank_is_named_with_what_it_does(how: str) -> None:
    first, second = together(freeze_one, 2, how)
    assert isinstance(first, PeerError)
    assert "rank 1 has given no sign of life for 1.5 s" in str(first)
    assert "while sampling" in str(first)
    # It goes on and hears of it; where all had come already, the exchange may end first.
    assert isinstance(second, PeerError) or (how == "stopped in an exchange" and second is None)


@pytest.mark.slow
def test_a_rank_that_works_for_long_is_waited_for() -> None:
    assert together(work_for_long, 2) == [None, None]


def test_silence_is_measured_by_the_pauses_so_far_and_not_by_pauses_of_ones_own() -> None:
    store: dict[str, bytes] = {}

    class Store:
        def set(self, key: str, value: str) -> None:
            store[key] = value.encode()

        def check(self, keys: list[str]) -> bool:
            return all(key in store for key in keys)

        def get(self, key: str) -> bytes:
            return store[key]

    now = [0.0]
    own, other = (Heartbeat(Store(), rank, 10.0, clock=lambda: now[0]) for rank in range(2))

    def silent_for(seconds: int, at_most: float) -> str | None:
        for _ in range(seconds):
            now[0] += 1
            found = own.frozen([1], at_most)
            if found is not None:
                return found
        return None

    assert silent_for(100, 100.0) is None  # it has not begun to tell
    other.begin("scoring")
    other.beat(0.0)
    assert silent_for(11, 100.0) is None
    now[0] += 1000  # this process was stopped itself: that says nothing of the other
    assert own.frozen([1], 100.0) == (
        "rank 1 has given no sign of life for 10 s (placement.silence) while scoring: it is "
        "stopped, or something holds its interpreter"
    )
    other.beat(2.0)  # it has paused for 2 s: it may be silent for 20 times as long
    assert silent_for(40, 100.0) is None
    other.beat(0.0)
    assert "no sign of life for 40 s" in str(silent_for(42, 100.0))
    other.beat(30.0)
    assert "no sign of life for 100 s" in str(silent_for(102, 100.0))


# The shares add up -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ((), 12),
        ((), 1),  # a rank without rollouts
        (("trainer.corpus=false",), 1),  # a rank without any work
        (("trainer.gradient_accumulation_steps=3",), 8),
        (("trainer.kl_weight=0",), 8),
    ],
)
def test_two_ranks_have_the_gradient_of_one(overrides: tuple[str, ...], rows: int) -> None:
    # GPT-2 is in float64 from end to end; llama's norms are in float32 always.
    overrides = (*overrides, "llm.model_name_or_path=tiny:gpt2")
    twice = (*overrides, "trainer.per_device_train_batch_size=8")
    half = (*overrides, "trainer.per_device_train_batch_size=4")
    alone, _ = step_in_float64(small_config(*twice), World.alone(), rows)
    first, second = together(gradients_in_float64, 2, half, rows)
    assert any(gradient.abs().max() > 0 for gradient in alone.values())
    for name, gradient in alone.items():
        assert gradient.dtype == torch.float64
        scale = gradient.abs().max().clamp_min(1e-12)
        assert (first[name] - gradient).abs().max() <= 1e-9 * scale, name
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("size", [2, 3, 40])
@pytest.mark.parametrize("kind", ["additive", "transformer", "head"])
def test_the_ranks_parts_of_the_auxiliarys_loss_add_up(kind: str, size: int) -> None:
    config = small_config(f"auxiliary={kind}")
    parts = small_parts(config)
    learn_target(parts, config, parts.llm.frozen(), 1)
    auxiliary, head = parts.auxiliary.eval(), parts.llm.head.frozen()
    labeled = parts.replay[0]
    batch = Examples.of(labeled, torch.arange(17), labeled.rollouts.ids_NT.shape[1], 0.5)

    def of(world: World) -> tuple[float, list[Tensor]]:
        auxiliary.zero_grad()
        with seed_everything(5):
            loss = fit._loss(auxiliary, head, batch, 0.3, 0.5, world)
        if loss is not None:
            loss.backward()
        got = [torch.zeros_like(p) if p.grad is None else p.grad for p in auxiliary.parameters()]
        return 0.0 if loss is None else float(loss.detach()), [gradient.clone() for gradient in got]

    whole_loss, whole = of(World.alone())
    losses, sums = 0.0, [torch.zeros_like(gradient) for gradient in whole]
    for rank in range(size):
        world = World.alone()
        world.rank, world.size = rank, size
        loss, own = of(world)
        losses += loss
        sums = [total + gradient for total, gradient in zip(sums, own, strict=True)]
    assert losses == pytest.approx(whole_loss, rel=1e-5)
    for total, gradient in zip(sums, whole, strict=True):
        torch.testing.assert_close(total, gradient, atol=1e-6, rtol=1e-4)


def test_all_ranks_see_the_fault_of_one() -> None:
    first, second = together(nan_on_one, 2)
    assert first == second
    assert "the loss is nan at step 3" in str(first)


def test_an_announced_guard_keeps_its_exit_code() -> None:
    assert DivergedError.exit_code == 4
