"""Whole small runs: the same twice, the same stopped and resumed, and what they say."""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small import go_on, run, small_config, small_parts, stopped
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from constrained_ft import checkpoint, evaluate, metrics, results, run_folder
from constrained_ft.config import Config
from constrained_ft.corpus import load_corpus
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import CheckpointError, ScorerError
from constrained_ft.loading import load_frozen, plain_config
from constrained_ft.metrics import METRICS
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder
from constrained_ft.scorers import build_scorer, score_all
from constrained_ft.tiny import byte_tokenizer

TIMES = {"time/target", "time/update", "time/iteration", "budget/seconds"}


class Notes(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def numbers(folder: RunFolder) -> list[dict[str, float]]:
    """The metrics but for the times."""
    rows = metrics.read(folder.metrics_file)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def newest_tensors(folder: RunFolder) -> dict[str, dict[str, Tensor]]:
    checkpoint = sorted(folder.checkpoints.glob("iteration_*"))[-1]
    return {
        file.name: safetensors.torch.load_file(file) for file in checkpoint.glob("*.safetensors")
    }


def assert_same(ours: RunFolder, theirs: RunFolder) -> None:
    """The same to the last bit: weights, optimizer, auxiliary, samples, numbers."""
    assert digests(ours.final_llm) == digests(theirs.final_llm)
    assert digests(ours.final_auxiliary) == digests(theirs.final_auxiliary)
    mine, others = newest_tensors(ours), newest_tensors(theirs)
    assert mine.keys() == others.keys()
    assert "optimizer.safetensors" in mine
    for file, tensors in mine.items():
        assert tensors.keys() == others[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[file][name]), (file, name)
    assert numbers(ours) == numbers(theirs)
    assert ours.evaluation_file.read_text() == theirs.evaluation_file.read_text()
    for folder in ("samples", "rollouts"):
        assert digests(ours.path / folder) == digests(theirs.path / folder)


def noted(config: Config, path: Path) -> tuple[RunFolder, list[str]]:
    """A run that goes on, and what it notes."""
    display = Notes()
    return go_on(config, path, display), display.notes


def resumed(config: Config, path: Path, *, after: int) -> tuple[RunFolder, list[str]]:
    """A run that was stopped after so many iterations, and the notes of its second half."""
    stopped(config, path, after=after)
    return noted(config, path)


VARIANTS = [
    (schedule, lora) for schedule in ("alternating", "overlapped") for lora in (False, True)
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, bool], RunFolder]:
    """Each variant, run without a stop."""
    path = tmp_path_factory.mktemp("straight")
    return {
        (schedule, lora): run(
            small_config(f"trainer={schedule}", lora=lora), path / f"{schedule}-{lora}"
        )
        for schedule, lora in VARIANTS
    }


# The same twice, stopped or not -------------------------------------------------------------------


def test_one_seed_gives_one_result_to_the_last_bit(
    straight: Mapping[tuple[str, bool], RunFolder], tmp_path: Path
) -> None:
    again = run(small_config("trainer=alternating"), tmp_path / "again")
    assert_same(again, straight["alternating", False])
    other = run(small_config("trainer=alternating", "seed=1"), tmp_path / "other")
    assert digests(other.final_llm) != digests(again.final_llm)
    assert digests(straight["overlapped", False].final_llm) != digests(again.final_llm)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_clock_that_jumps_by_a_day_changes_dates_and_nothing_else(
    straight: Mapping[tuple[str, bool], RunFolder],
    direction: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    usual, looks = time.time, itertools.count()

    def days() -> int:
        return direction * next(looks)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Jumping":
            return cls.fromtimestamp(usual() + 86400 * days(), tz)

    monkeypatch.setattr(time, "time", lambda: usual() + 86400 * days())
    monkeypatch.setattr(run_folder, "datetime", Jumping)
    folder = run(small_config("trainer=overlapped"), tmp_path / "run")
    assert_same(folder, straight["overlapped", False])
    assert next(looks) > 3
    assert folder.status()["updated"][:10] != f"{datetime.now(UTC):%Y-%m-%d}"
    seconds = [
        row[name] for row in metrics.read(folder.metrics_file) for name in TIMES & row.keys()
    ]
    phases = json.loads(folder.phases_file.read_text())["phases"].values()
    seconds += [phase["seconds"] for phase in phases]
    assert all(0 <= one < 3600 for one in seconds)


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize(("schedule", "lora"), VARIANTS)
def test_stopped_and_resumed_is_straight_through(
    straight: Mapping[tuple[str, bool], RunFolder],
    tmp_path: Path,
    *,
    schedule: str,
    lora: bool,
    after: int,
) -> None:
    config = small_config(f"trainer={schedule}", lora=lora)
    folder, notes = resumed(config, tmp_path / "run", after=after)
    assert notes[0] == f"continuing after iteration {after}, from iteration_{after:04d}"
    assert_same(folder, straight[schedule, lora])


def test_a_matched_stale_reference_survives_a_stop(tmp_path: Path) -> None:
    config = small_config("trainer=overlapped", "trainer.reference=matched")
    folder, _ = resumed(config, tmp_path / "stopped", after=2)
    assert_same(folder, run(config, tmp_path / "straight"))


@pytest.mark.parametrize("first_layer", [None, 1])
def test_a_stopped_run_mines_the_same_prompts(tmp_path: Path, first_layer: int | None) -> None:
    config = small_config(
        "prompts.candidates=3", lora=first_layer is not None, first_layer=first_layer or 0
    )
    folder, _ = resumed(config, tmp_path / "stopped", after=2)
    assert_same(folder, run(config, tmp_path / "straight"))


def test_a_damaged_checkpoint_is_passed_over_and_named(
    straight: Mapping[tuple[str, bool], RunFolder], tmp_path: Path
) -> None:
    config = small_config("trainer=alternating")
    folder = stopped(config, tmp_path, after=2)
    file = folder.checkpoints / "iteration_0002" / "llm.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    folder, notes = noted(config, tmp_path)
    assert notes[:2] == [
        "checkpoint passed over: iteration_0002: llm.safetensors is damaged",
        "continuing after iteration 1, from iteration_0001",
    ]
    assert digests(folder.final_llm) == digests(straight["alternating", False].final_llm)


def test_the_newest_two_checkpoints_are_kept(
    straight: Mapping[tuple[str, bool], RunFolder],
) -> None:
    for folder in straight.values():
        kept = sorted(path.name for path in folder.checkpoints.iterdir())
        assert kept == ["iteration_0002", "iteration_0003"]


def test_a_checkpoint_of_another_shape_is_refused(
    straight: Mapping[tuple[str, bool], RunFolder], tmp_path: Path
) -> None:
    newest, faults = checkpoint.newest(straight["alternating", False].checkpoints)
    assert newest is not None
    assert not faults
    other = small_config("auxiliary.rank=8")
    parts = small_parts(other)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this run.*use the run's own"):
        checkpoint.restore(newest, parts, other)
    assert checkpoint.newest(tmp_path) == (None, [])


# What a run says ----------------------------------------------------------------------------------


def test_every_metric_has_a_meaning_and_every_meaning_a_metric(
    straight: Mapping[tuple[str, bool], RunFolder], tmp_path: Path
) -> None:
    seen: set[str] = set()
    for folder in straight.values():
        for row in metrics.read(folder.metrics_file):
            assert {metrics.entry(name) for name in row} <= set(METRICS)
            assert all(math.isfinite(value) for value in row.values())
            seen |= {metrics.entry(name) for name in row}
    # Those of peers, guards, judges, several constraints, roll-ins, a server and TRL are in
    # their own tests.
    elsewhere = {"time/wait_target", "time/wait_llm", "update/rolled_back"}
    elsewhere |= {"rollouts/guided_satisfaction", "rollouts/logprob_gap"}
    elsewhere |= {name for name in METRICS if name.startswith(("term", "judge", "trl"))}
    assert seen == set(METRICS) - elsewhere
    with pytest.raises(KeyError):
        metrics.append(tmp_path / "metrics.jsonl", {"update/loss": 1.0, "no/meaning": 2.0})
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_the_rollouts_on_disk_carry_the_scorers_verdict(
    straight: Mapping[tuple[str, bool], RunFolder],
) -> None:
    folder = straight["alternating", False]
    scorer = build_scorer(small_config().constraint.scorer)
    for iteration, row in enumerate(metrics.read(folder.metrics_file), start=1):
        lines = folder.rollouts_file(iteration).read_text(encoding="utf-8").splitlines()
        rollouts = [json.loads(line) for line in lines]
        assert len(rollouts) == 40
        texts = [one["completion"] for one in rollouts]
        scores = score_all(scorer, [one["prompt"] for one in rollouts], texts)
        assert [one["score"] for one in rollouts] == scores
        share = sum(score >= 0.5 for score in scores) / len(scores)
        assert row["rollouts/satisfaction"] == pytest.approx(share)
        assert {one["llm_iteration"] for one in rollouts} == {iteration}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_final_model_is_a_plain_one_and_says_what_was_measured(
    straight: Mapping[tuple[str, bool], RunFolder], *, lora: bool
) -> None:
    folder = straight["alternating", lora]
    base, tuned = results.load(folder.evaluation_file)
    assert (base.model, tuned.model) == ("base", "tuned")
    assert base.kl_to_base is None
    assert tuned.kl_to_base is not None
    assert tuned.kl_to_base > 0
    plain = AutoModelForCausalLM.from_pretrained(folder.final_llm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.final_llm)
    (perplexity,) = tuned.perplexity.values()
    assert perplexity_by_transformers(plain) == pytest.approx(perplexity.mean, rel=1e-4)
    ids = tokenizer("The", return_tensors="pt")
    assert plain.generate(**ids, max_new_tokens=3, pad_token_id=0).shape[1] <= 6


def perplexity_by_transformers(model: torch.nn.Module) -> float:
    config = small_config()
    rows = load_corpus(config.data, byte_tokenizer()).validation
    chosen = rows[: config.evaluation.max_validation_rows]
    total, tokens = 0.0, 0
    for row in chosen:
        ids = torch.tensor([row.token_ids])
        labels = torch.where(torch.tensor([row.trained]), ids, -100)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        total += float(loss) * sum(row.trained)
        tokens += sum(row.trained)
    return math.exp(total / tokens)


def test_the_evaluation_is_that_of_the_samples(
    straight: Mapping[tuple[str, bool], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = straight["alternating", False]
    _, tuned = results.load(folder.evaluation_file)
    (result,) = tuned.groups.values()
    config = small_config("trainer=alternating")
    texts: list[str] = []
    sample = evaluate.sample

    def keep(*arguments: object, **named: object) -> object:
        rollouts = sample(*arguments, **named)  # type: ignore[arg-type]
        texts.extend(rollouts.texts)
        return rollouts

    monkeypatch.setattr(evaluate, "sample", keep)
    parts = small_parts(config)
    scorer = build_scorer(config.constraint.scorer)
    prompts = evaluate.choose_prompts(parts.prompts.held_out, config.evaluation.max_prompts)
    again = evaluate.evaluate(
        load_frozen(plain_config(str(folder.final_llm)), precision="fp32"),
        prompts,
        parts.corpus.validation,
        [scorer],
        {},
        config,
        model="tuned",
        base=None,
        display=Silent(),
        stop=StopRequest(),
    )
    assert again.groups == tuned.groups
    clean = [float("e" not in text.lower()) for text in texts]
    assert result.satisfaction.mean == pytest.approx(sum(clean) / len(clean))
    assert result.violation.mean == pytest.approx(1 - sum(clean) / len(clean))
    by_prompt = [clean[i : i + 4] for i in range(0, len(clean), 4)]
    any_share = sum(min(four) < 0.5 for four in by_prompt) / len(by_prompt)
    assert result.any_violation.mean == pytest.approx(any_share)
    words = [text.split() for text in texts]
    assert result.distinct_1 == pytest.approx(
        len({w for t in words for w in t}) / max(1, sum(len(t) for t in words))
    )
    assert len({prompt.id for prompt in prompts} & {p.id for p in parts.prompts.training}) == 0


# What a run does ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[float, float]]:
    """Held-out satisfaction before and after some short runs."""
    path = tmp_path_factory.mktemp("trained")
    longer = (
        "trainer.steps_per_iteration=20",
        "prompts.prompts_per_iteration=24",
        "prompts.samples_per_prompt=8",
        "prompts.max_new_tokens=12",
        "auxiliary.max_epochs=10",
        "evaluation.max_prompts=20",
        "evaluation.samples_per_prompt=16",
    )
    rates = {}
    for name, overrides in {
        "alternating": ["trainer=alternating"],
        "overlapped": ["trainer=overlapped"],
        "plain": ["trainer=alternating", "trainer.kl_weight=0"],
    }.items():
        folder = run(small_config(*longer, *overrides), path / name)
        base, tuned = results.load(folder.evaluation_file)
        (before,), (after,) = base.groups.values(), tuned.groups.values()
        rates[name] = (before.satisfaction.mean, after.satisfaction.mean)
    return rates


def test_satisfaction_rises_with_the_constraint_and_falls_without(
    trained: Mapping[str, tuple[float, float]],
) -> None:
    for schedule in ("alternating", "overlapped"):
        before, after = trained[schedule]
        assert 1 - after < 0.5 * (1 - before)
        assert 1 - after < 0.25 * (1 - trained["plain"][1])
    before, after = trained["plain"]
    assert after < before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constraint.scorer.at_most=100"], "40 of 40 probe samples.*raise it"),
        (["constraint.scorer.kind=function"], "0 of 40 probe samples.*lower it"),
    ],
    ids=["always", "never"],
)
def test_a_base_that_satisfies_always_or_never_is_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    if "function" in overrides[0]:
        file = tmp_path / "never.py"
        file.write_text("def score(prompts, completions):\n    return [0.0] * len(completions)\n")
        overrides = ["constraint=function", f"constraint.scorer.path={file}:score"]
    with pytest.raises(ScorerError, match=message) as caught:
        run(small_config(*overrides), tmp_path / "run")
    assert caught.value.exit_code == 3
    # Without the constraint there is nothing to learn from it.
    run(
        small_config(*overrides, "trainer.kl_weight=0", "trainer.iterations=1"),
        tmp_path / "plain",
    )
