"""What guards find, and what then happens: the run stops, or a step or an update is left out."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from small import run, small_config, small_parts
from torch import Tensor

from constrained_ft import checkpoint, finetune, metrics
from constrained_ft import target as target_module
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import DivergedError
from constrained_ft.finetune import fault_of_step
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder
from constrained_ft.scorers import Score
from constrained_ft.scorers.letters import LettersScorer
from constrained_ft.target import fault_of_target, learn_target
from constrained_ft.train import train

HEALTHY = {"update/loss": 2.0, "update/kl": 0.1, "update/ce": 1.9}


@pytest.mark.parametrize(
    ("change", "norm", "words"),
    [
        ({"update/loss": math.nan}, 1.0, "the loss is nan"),
        ({"update/loss": math.inf}, 1.0, "the loss is inf"),
        ({"update/kl": 9.0}, 1.0, "above guard.kl_limit=5.0"),
        ({"update/kl": -2e-5}, 1.0, "below zero"),
        ({}, math.nan, "the gradient's norm is nan"),
        ({}, math.inf, "the gradient's norm is inf"),
    ],
)
def test_a_faulty_step_is_found(change: dict[str, float], norm: float, words: str) -> None:
    fault = fault_of_step(HEALTHY | change, norm, small_config().guard, 7)
    assert fault is not None
    assert words in fault
    assert "step 7" in fault


def test_a_healthy_step_has_no_fault() -> None:
    guard = small_config().guard
    assert fault_of_step(HEALTHY, 1.0, guard, 7) is None
    assert fault_of_step(HEALTHY | {"update/kl": -5e-6}, 1.0, guard, 7) is None  # rounding


def test_a_faulty_target_is_found() -> None:
    config = small_config()
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    assert fault_of_target(target, config.guard) is None
    facts = target.facts
    for changed, words in [
        (replace(facts, kl_N=facts.kl_N * math.nan), "not a number"),
        (replace(facts, log_satisfied_S=facts.log_satisfied_S - math.inf), "not a number"),
        (replace(facts, log_satisfied_S=facts.log_satisfied_S + 20), "above 1"),
        (replace(facts, kl_N=facts.kl_N - 1), "below zero"),
        (replace(facts, entropy=0.01), "entropy has fallen to 0.01"),
        (replace(facts, entropy=math.nan), "entropy"),
    ]:
        fault = fault_of_target(replace(target, facts=changed), config.guard)
        assert fault is not None
        assert words in fault


def test_the_entropy_is_that_of_the_sampling_model() -> None:
    config = small_config()
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    rollouts = parts.replay[0].rollouts
    surprise, count = 0.0, 0
    for row in range(len(rollouts.texts)):
        before = list(rollouts.prompts[int(rollouts.prompt_N[row])].token_ids)
        said = rollouts.ids_NT[row][rollouts.mask_NT[row]].tolist()
        with torch.no_grad():
            logits = parts.llm.module(torch.tensor([before + said])).logits[0]
        logprobs = logits[len(before) - 1 : -1].log_softmax(-1)
        surprise -= float(logprobs[torch.arange(len(said)), said].sum())
        count += len(said)
    assert target.metrics["rollouts/entropy"] == pytest.approx(surprise / count, rel=1e-4)


class Sabotage:
    """Makes the loss of some steps NaN, after the real gradient was there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        usual = finetune.backward_of_step
        self.step = -1

        def backward(*arguments: object, **named: object) -> dict[str, float]:
            self.step += 1
            losses = usual(*arguments, **named)  # type: ignore[arg-type]
            return losses | ({"update/loss": math.nan} if self.step in steps else {})

        monkeypatch.setattr(finetune, "backward_of_step", backward)


def weights(path: Path, iteration: int) -> dict[str, Tensor]:

    return safetensors.torch.load_file(
        path / f"checkpoints/iteration_{iteration:04d}/llm.safetensors"
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_stop_ends_with_the_last_checkpoint_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Sabotage(monkeypatch, {3})
    with pytest.raises(DivergedError, match=r"the loss is nan at step 3") as caught:
        run(small_config(), tmp_path / "run")
    assert caught.value.exit_code == 4
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["iteration_0000", "iteration_0001"]


@pytest.mark.parametrize("schedule", ["alternating", "overlapped"])
def test_skip_leaves_the_step_out_and_nothing_else(
    schedule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Sabotage(monkeypatch, {2, 3})  # both steps of iteration 2
    config = small_config("guard.on_failure=skip", f"trainer={schedule}")
    folder = run(config, tmp_path / "run")
    rows = metrics.read(folder.metrics_file)
    assert [row["update/skipped_steps"] for row in rows] == [0, 2, 0]
    assert "update/loss" not in rows[1]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    third = weights(folder.path, 3)
    assert all(torch.isfinite(tensor).all() for tensor in third.values())
    assert not same(weights(folder.path, 2), third)


def test_rollback_takes_the_whole_update_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Sabotage(monkeypatch, {1})  # the second step of iteration 1
    config = small_config("guard.on_failure=rollback", "trainer.iterations=2")
    folder = run(config, tmp_path / "run")
    rows = metrics.read(folder.metrics_file)
    assert rows[0]["update/rolled_back"] == 1
    assert "update/rolled_back" not in rows[1]
    start = small_parts(config).llm.trained_parameters()
    assert same(weights(folder.path, 1), {n: p.detach() for n, p in start.items()})
    assert not same(weights(folder.path, 2), weights(folder.path, 1))
    assert rows[1]["update/learning_rate"] == pytest.approx(0.0, abs=1e-9)  # the schedule went on


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_faults_in_a_row_stop_all_the_same(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Sabotage(monkeypatch, set(range(100)))
    config = small_config(
        f"guard.on_failure={policy}", "guard.max_failures=1", "trainer.iterations=4"
    )
    with pytest.raises(DivergedError, match=r"the last of 2 in a row; guard\.max_failures=1"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_target_with_a_fault_is_not_used(policy: str, tmp_path: Path) -> None:
    config = small_config(
        f"guard.on_failure={policy}", "guard.min_entropy=100", "trainer.iterations=2"
    )
    folder = run(config, tmp_path / "run")
    rows = metrics.read(folder.metrics_file)
    assert [row["update/skipped_steps"] for row in rows] == [2, 2]
    start = small_parts(config).llm.trained_parameters()
    assert same(weights(folder.path, 2), {n: p.detach() for n, p in start.items()})


def test_a_target_with_a_fault_stops_the_run_by_default(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"entropy has fallen to .*guard\.min_entropy=100"):
        run(small_config("guard.min_entropy=100"), tmp_path / "run")


# Numbers that are none, wherever they come from --------------------------------------------------


class Injection(Silent):
    """Spoils one number in iteration 2 of a run; iterations 1 and 3 are left alone."""

    def __init__(
        self, patch: pytest.MonkeyPatch, folder: RunFolder, site: str, value: float
    ) -> None:
        self.folder, self.value = folder, value
        self.finished, self.done = 0, 0
        self.weights: list[dict[str, Tensor]] = []
        owner, name = self.sites[site]
        usual = getattr(owner, name)

        def spoiled(*arguments: Any, **named: Any) -> Any:
            found = usual(*arguments, **named)
            return getattr(self, f"_{site}")(found, arguments) if self.finished == 1 else found

        patch.setattr(owner, name, spoiled)

    sites: ClassVar[dict[str, tuple[Any, str]]] = {
        "loss": (finetune, "fused_losses"),
        "gradient": (finetune, "backward_of_step"),
        "auxiliary": (target_module, "fit_auxiliary"),
        "scores": (LettersScorer, "score"),
        "sampled": (target_module, "sample"),
        "reference": (target_module, "states_of"),
    }

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        self.finished = number
        self.weights.append(weights(self.folder.path, number))

    def _loss(self, found: Any, arguments: Any) -> Any:
        self.done += 1
        return replace(found, loss=found.loss * self.value)

    def _gradient(self, found: Any, arguments: Any) -> Any:
        self.done += 1
        next(iter(arguments[0].trained_parameters().values())).grad.view(-1)[0] = self.value
        return found

    def _auxiliary(self, found: Any, arguments: Any) -> Any:
        self.done += 1
        with torch.no_grad():
            arguments[0].root.bias.fill_(self.value)  # the limit on R's logits would hide it
        return found

    def _scores(self, found: Any, arguments: Any) -> Any:
        self.done += 1
        return [Score(self.value), *found[1:]]

    def _sampled(self, found: Any, arguments: Any) -> Any:
        self.done += 1
        found.hidden_NTD[3, 0, 0] = self.value
        return found

    def _reference(self, found: Any, arguments: Any) -> Any:
        self.done += 1
        found[:, 0, 0] = self.value
        return found


def all_finite(folder: RunFolder) -> bool:
    """Whether weights, R, optimizer and everything else of all checkpoints are numbers."""
    files = list(folder.path.rglob("*.safetensors"))
    assert len(files) > 4
    skipped = ("replay_", "target")  # rollouts of the fault itself, which are not learned from
    return all(
        bool(torch.isfinite(tensor.float()).all())
        for file in files
        if not file.name.startswith(skipped)
        for tensor in safetensors.torch.load_file(file).values()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("site", [*Injection.sites])
def test_no_number_that_is_none_reaches_a_weight(
    site: str, policy: str, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(
        f"guard.on_failure={policy}",
        "prompts.prompts_per_iteration=6",
        "evaluation.max_prompts=4",
        "constraint.max_missing_rate=0.5",
        "auxiliary.replay_iterations=1",
        "trainer.lr_scheduler=constant",
        # In float32 the reference is what sampling left.
        *(("trainer.precision=bf16",) if site == "reference" else ()),
    )
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    spoiled = Injection(monkeypatch, folder, site, value)
    try:
        if policy == "stop" and site != "scores":
            with pytest.raises(DivergedError) as caught:
                train(config, folder, spoiled, StopRequest())
            assert caught.value.exit_code == 4
            assert checkpoint.newest(folder.checkpoints) == (folder.checkpoint(1), [])
            assert len(list(folder.checkpoints.iterdir())) == 2
            return
        train(config, folder, spoiled, StopRequest())
    finally:
        folder.close()
        assert spoiled.done > 0
        assert all_finite(folder)
    first, second, third = metrics.read(folder.metrics_file)
    assert all(math.isfinite(number) for row in (first, third) for number in row.values())
    assert "auxiliary/log_loss" in third
    untouched = same(spoiled.weights[1], spoiled.weights[0])
    if site == "scores":  # missing, never a number: whatever the policy, the rest is learned from
        assert second["rollouts/missing"] > 0
        assert not untouched
    elif policy == "rollback" and site not in ("auxiliary", "sampled"):
        assert second["update/rolled_back"] == 1
        assert untouched
    else:  # the second step reads the reference anew; the first one reads the LLM as it is
        assert second["update/skipped_steps"] == (1 if site == "reference" else 2)
        assert untouched == (site != "reference")
    assert third["update/skipped_steps"] == 0
    assert not same(spoiled.weights[2], spoiled.weights[1])
