"""Both schedules are one loop: which target an update reads, and that nothing can change it."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from small import run, small_config, small_parts
from torch import Tensor

from constrained_ft import metrics, placement
from constrained_ft import train as loop
from constrained_ft.finetune import rows_after_first_step
from constrained_ft.fused import fused_losses
from constrained_ft.run_folder import RunFolder
from constrained_ft.target import Target, learn_target
from constrained_ft.train import update_llm

NOWHERE = RunFolder(Path("nowhere"))
NO_UPDATE = {
    "update/ce": 0.0,
    "update/kl": 0.0,
    "update/kl_first": 0.0,
    "update/loss": 0.0,
    "update/grad_norm": 0.0,
    "update/learning_rate": 0.0,
    "update/skipped_steps": 0.0,
}


class Watch:
    """What the loop learned and what its updates read, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, updates: bool) -> None:
        self.learned: list[Target] = []
        self.used: list[Target] = []

        def learn(*arguments: object) -> Target:
            self.learned.append(learn_target(*arguments))  # type: ignore[arg-type]
            return self.learned[-1]

        def update(parts: object, target: Target, *rest: object) -> object:
            self.used.append(target)
            return update_llm(parts, target, *rest) if updates else NO_UPDATE  # type: ignore[arg-type]

        monkeypatch.setattr(placement, "learn_target", learn)
        monkeypatch.setattr(loop, "update_llm", update)

    def numbers(self) -> tuple[list[int], list[int]]:
        """The iterations of the targets learned, and of those read."""
        return [t.iteration for t in self.learned], [t.iteration for t in self.used]


def tensors(value: object) -> list[Tensor]:
    """All tensors of a dataclass, in the order of its fields."""
    if isinstance(value, Tensor):
        return [value]
    if not is_dataclass(value):
        return []
    return [t for field in fields(value) for t in tensors(getattr(value, field.name))]


def equal(a: Target, b: Target) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.rollouts.texts == b.rollouts.texts and all(torch.equal(x, y) for x, y in pairs)


def test_overlapped_without_updates_is_alternating_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = {}
    for schedule, reference in [
        ("alternating", "fresh"),
        ("overlapped", "matched"),
        ("overlapped", "fresh"),
    ]:
        config = small_config(f"trainer={schedule}", f"trainer.reference={reference}")
        watch = Watch(monkeypatch, updates=False)
        run(config, tmp_path / schedule / reference)
        monkeypatch.undo()
        watched[schedule, reference] = watch
    alternating = watched["alternating", "fresh"]
    assert alternating.numbers() == ([1, 2, 3, 4], [1, 2, 3])
    for reference in ("matched", "fresh"):
        overlapped = watched["overlapped", reference]
        # The update of iteration 1 waits; then each reads the target before; no third is learned.
        # The fourth, of the final LLM, is for R alone.
        assert overlapped.numbers() == ([1, 2, 4], [1, 1, 2])
        for ours, theirs in zip(overlapped.learned[:2], alternating.learned, strict=False):
            # A fresh reference comes with the update, a matched one is learned.
            assert equal(replace(ours, reference=theirs.reference), theirs)
        for iteration, ours in enumerate(overlapped.used, 1):
            theirs = alternating.used[ours.iteration - 1]
            assert equal(replace(ours, reference=theirs.reference), theirs)
            # The LLM stands still, so a fresh reference is the matched one.
            rows_N = rows_after_first_step(ours, config, iteration)
            mask_NT = ours.rollouts.mask_NT[rows_N]
            torch.testing.assert_close(
                ours.reference.hidden_NTD[rows_N][mask_NT],
                theirs.rollouts.hidden_NTD[rows_N][mask_NT],
            )
    used = alternating.used
    assert not equal(used[0], used[1])


def test_the_log_says_how_old_each_target_was(tmp_path: Path) -> None:
    lags = {}
    for schedule in ("alternating", "overlapped"):
        folder = run(small_config(f"trainer={schedule}"), tmp_path / schedule)
        lags[schedule] = [row["target/lag"] for row in metrics.read(folder.metrics_file)]
    assert lags == {"alternating": [0, 0, 0], "overlapped": [0, 1, 1]}


def test_fitting_r_again_and_moving_the_llm_leave_a_target_as_it_was() -> None:
    config = small_config()
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    before = [tensor.clone() for tensor in tensors(target)]
    tilt = target.tilt(*target.rollouts.mask_NT.nonzero(as_tuple=True))
    states = torch.zeros_like(tilt.hidden_MD)
    kl = fused_losses(states, tilt.head, tilt=tilt).kl_M
    loop._update(parts, target, config, NOWHERE, 1)
    weights = [parameter.clone() for parameter in parts.auxiliary.parameters()]
    learn_target(parts, config, parts.llm.frozen(), 2)
    moved = zip(weights, parts.auxiliary.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in moved)
    for old, new in zip(before, tensors(target), strict=True):
        assert torch.equal(old, new)
    tilt = target.tilt(*target.rollouts.mask_NT.nonzero(as_tuple=True))
    again = fused_losses(states, tilt.head, tilt=tilt).kl_M
    assert kl is not None
    assert again is not None
    assert torch.equal(kl, again)


@pytest.mark.parametrize("reference", ["fresh", "matched"])
def test_a_stale_target_gets_the_reference_that_is_asked_for(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("trainer=overlapped", f"trainer.reference={reference}")
    parts = small_parts(config)
    first = learn_target(parts, config, parts.llm.frozen(), 1)
    loop._update(parts, first, config, NOWHERE, 1)
    now = first.with_reference(parts.llm.frozen(), rows_after_first_step(first, config, 2))
    assert not equal(first, now)
    watch = Watch(monkeypatch, updates=True)
    assert loop._update(parts, first, config, NOWHERE, 2)["target/lag"] == 1
    assert equal(watch.used[0], now if reference == "fresh" else first)


def test_a_fresh_reference_is_the_llm_as_it_stands() -> None:
    config = small_config("trainer.learning_rate=0.05")
    parts = small_parts(config)
    first = learn_target(parts, config, parts.llm.frozen(), 1)
    loop._update(parts, first, config, NOWHERE, 1)
    fresh = first.with_reference(parts.llm.frozen())
    rollouts = first.rollouts
    for row in range(0, len(rollouts.texts), 7):
        prompt_ids = list(rollouts.prompts[int(rollouts.prompt_N[row])].token_ids)
        said = rollouts.ids_NT[row][rollouts.mask_NT[row]].tolist()
        with torch.no_grad():
            logits = parts.llm.module(torch.tensor([prompt_ids + said])).logits[0]
        mine = fresh.reference.head(fresh.reference.hidden_NTD[row, : len(said)])
        expected = logits[len(prompt_ids) - 1 : -1]
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
