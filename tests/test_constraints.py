"""Whole runs under several constraints, with scores that are missing, and towards a rate."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL, go_on, run, small_config, small_parts, stopped

from constrained_ft import metrics, preflight, results
from constrained_ft.compose import compose
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import MissingScoresError, ScorerError
from constrained_ft.finetune import update_llm
from constrained_ft.intervals import Interval
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.regimes import advice
from constrained_ft.results import Evaluation, GroupResult
from constrained_ft.rollouts import Rollouts, label, with_scores
from constrained_ft.run_folder import RunFolder
from constrained_ft.scorers import build_scorer, score_all
from constrained_ft.selfcheck import _LETTERS, _TRAINING, _WITHOUT_CORPUS
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import learn_target
from constrained_ft.term_heads import measure_terms
from constrained_ft.train import train

TERMS = (
    "constraint=several",
    "constraint.terms.nontoxic.scorer={kind: letters, letter: e, at_most: 0}",
    "constraint.terms.brief.scorer.unit=words",
    "constraint.terms.brief.scorer.at_most=1",
)


# Several constraints ------------------------------------------------------------------------------


def test_a_run_under_two_constraints_reports_both(tmp_path: Path) -> None:
    config = small_config(*TERMS, "constraint.terms.brief.threshold=0.95")
    folder = run(config, tmp_path / "run")
    terms = config.constraint.all_terms()
    scorers = {name: build_scorer(term.scorer) for name, term in terms.items()}
    for number, row in enumerate(metrics.read(folder.metrics_file), start=1):
        lines = folder.rollouts_file(number).read_text(encoding="utf-8").splitlines()
        rollouts = [json.loads(line) for line in lines]
        texts = [one["completion"] for one in rollouts]
        prompts = [one["prompt"] for one in rollouts]
        held = []
        for name, scorer in scorers.items():
            scores = torch.tensor(score_all(scorer, prompts, texts))
            held.append(scores >= terms[name].satisfied_at)
            satisfied = float(held[-1].float().mean())
            assert row[f"term/{name}/satisfaction"] == pytest.approx(satisfied)
        both = torch.stack(held).all(0)
        assert row["rollouts/satisfaction"] == pytest.approx(float(both.float().mean()))
        assert [one["satisfied"] for one in rollouts] == both.tolist()
        assert row["term/brief/beta"] >= 0
        assert all(math.isfinite(value) for value in row.values())
    _, tuned = results.load(folder.evaluation_file)
    (group,) = tuned.groups.values()
    assert set(group.terms) == {"nontoxic", "brief"}
    assert group.satisfaction.mean <= min(one.mean for one in group.terms.values()) + 1e-9
    _, table = results.table([tuned])
    assert [row[0].strip() for row in table if "of " in row[0]][:2] == ["of nontoxic", "of brief"]


def foreseen(outside: float, *, dependent: bool = False, product: bool = False) -> dict[str, float]:
    """Of two independent terms that the hidden states show; R is off by `outside`.

    Dependent ones hold together or not at all, half of the time, where a state says so; else each
    holds in three of five cases. Of a product the R of each knows this, and is off by `outside`.
    """
    terms = "auxiliary.terms=product" if product else "auxiliary.terms=joint"
    config = small_config(*TERMS, "constraint.terms.nontoxic.labels=hard", terms)
    count, steps = 3200 if dependent else 800, 4
    hidden_NTD = torch.randn(count, steps, 8, generator=torch.Generator().manual_seed(0))
    held_NJ = hidden_NTD[:, steps // 2, :2] > -0.3
    if dependent:
        chance_NJ = torch.rand(count, 2, generator=torch.Generator().manual_seed(1))
        together_N = hidden_NTD[:, steps // 2, 0] > 0
        held_NJ = torch.where(together_N[:, None], chance_NJ[:, :1] < 0.5, chance_NJ < 0.6)
    prompts = tuple(
        Prompt(id=str(i), text="", group="prompts", token_ids=(0,)) for i in range(count // 4)
    )
    rollouts = Rollouts(
        prompts=prompts,
        prompt_N=torch.arange(len(prompts)).repeat_interleave(4),
        ids_NT=torch.zeros(count, steps, dtype=torch.long),
        mask_NT=torch.ones(count, steps, dtype=torch.bool),
        hidden_NTD=hidden_NTD,
        texts=("",) * count,
        guided_N=torch.zeros(count, dtype=torch.long),
        iteration=1,
        sampled_by="cft",
    )
    scores_NJ = held_NJ.float()
    labeled = with_scores(rollouts, scores_NJ.T.tolist(), config.constraint)
    said_NJ = held_NJ.all(-1, keepdim=True).float()
    if product:
        together_N = hidden_NTD[:, steps // 2, 0] > 0
        said_NJ = torch.where(together_N, 0.5, 0.6)[:, None].expand(-1, 2) * (1 - outside)
    else:
        said_NJ = said_NJ * (1 - outside) + outside * (1 - said_NJ)
    return measure_terms(labeled, said_NJ[:, None].expand(-1, steps, -1), config)


def test_the_heads_of_the_terms_foresee_them_and_bound_r() -> None:
    well = foreseen(0.0)
    assert well["term/nontoxic/auc"] > 0.9
    assert well["term/brief/auc"] > 0.9
    wrong = foreseen(1.0)
    assert well["terms/product_gap"] < 0.3 < wrong["terms/product_gap"]
    assert well["terms/outside_bounds"] < wrong["terms/outside_bounds"]
    assert wrong["terms/outside_bounds"] > 0.5
    assert well["terms/product_auc"] > well["terms/joint_auc"] > 0.7
    # 0.36 < 0.5 is how often both hold, and 0.36 > 0.25 is what the product says.
    dependent = foreseen(0.0, dependent=True)
    assert dependent["terms/product_auc"] < 0.5 < dependent["terms/joint_auc"]


def test_the_rate_at_which_all_hold_is_watched_beside_the_r_of_each() -> None:
    well = foreseen(0.0, dependent=True, product=True)
    # Both hold in 0.5 and 0.36 of the cases, of which the product says 0.25 and 0.36.
    assert well["terms/product_bias"] == pytest.approx(-0.125, abs=0.05)
    assert well["terms/product_gap"] == pytest.approx(0.125, abs=0.05)
    assert well["terms/outside_bounds"] < 0.05
    wrong = foreseen(0.8, dependent=True, product=True)
    assert wrong["terms/outside_bounds"] > 0.9
    assert wrong["terms/product_bias"] < well["terms/product_bias"] - 0.1


def test_a_run_with_solved_tilts_is_continued_to_the_same_weights(tmp_path: Path) -> None:
    config = small_config(
        *TERMS,
        "constraint.terms.brief.threshold=0.95",
        "constraint.terms.nontoxic={labels: hard, target_rate: 0.9}",
        "trainer.target_rate=0.9",
    )
    straight = run(config, tmp_path / "straight")
    stopped(config, tmp_path / "run", after=1)
    folder = go_on(config, tmp_path / "run")
    for name in ("final/llm/model.safetensors", "final/auxiliary/auxiliary.safetensors"):
        assert (straight.path / name).read_bytes() == (folder.path / name).read_bytes()
    rates = [row["update/kl_weight"] for row in metrics.read(folder.metrics_file)]
    assert rates == [row["update/kl_weight"] for row in metrics.read(straight.metrics_file)]
    assert len(set(rates)) == 3
    tilts = [row["term/nontoxic/beta"] for row in metrics.read(folder.metrics_file)]
    assert tilts == [row["term/nontoxic/beta"] for row in metrics.read(straight.metrics_file)]
    assert len(set(tilts)) > 1


# Scores that are missing --------------------------------------------------------------------------


def failing(tmp_path: Path, rule: str) -> tuple[str, str]:
    """Overrides for a scorer that gives None where a rule of Python says so."""
    file = tmp_path / "failing.py"
    file.write_text(
        "CALLS = []\n"
        "def score(prompts, completions):\n"
        "    CALLS.append(completions)\n"
        f"    return [None if {rule} else float('e' not in text) for text in completions]\n"
    )
    return "constraint=function", f"constraint.scorer.path={file}:score"


def test_what_is_missing_is_left_out_of_every_rate(tmp_path: Path) -> None:
    rule = "text and ord(text[-1]) % 8 == 0"
    config = small_config(*failing(tmp_path, rule), "constraint.max_missing_rate=0.5")
    folder = run(config, tmp_path / "run")
    missing = 0
    for number, row in enumerate(metrics.read(folder.metrics_file), start=1):
        lines = folder.rollouts_file(number).read_text(encoding="utf-8").splitlines()
        rollouts = [json.loads(line) for line in lines]
        assert not any(
            one["completion"] and ord(one["completion"][-1]) % 8 == 0 for one in rollouts
        )
        assert row["rollouts/missing"] == pytest.approx(1 - len(rollouts) / 40)
        share = sum("e" not in one["completion"] for one in rollouts) / len(rollouts)
        assert row["rollouts/satisfaction"] == pytest.approx(share)
        missing += 40 - len(rollouts)
    assert missing > 0
    base, _ = results.load(folder.evaluation_file)
    (group,) = base.groups.values()
    assert group.missing > 0
    assert any("without a score" in row[0] for row in results.table([base])[1])


def test_too_many_missing_scores_stop_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    config = small_config(*failing(tmp_path, "len(CALLS) > 6"))
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with pytest.raises(MissingScoresError) as caught:
        train(config, folder, Silent(), StopRequest())
    folder.close()
    assert caught.value.exit_code == 4
    assert "the function returned None" in str(caught.value)
    assert "constraint.max_missing_rate=0.05" in str(caught.value)
    assert list(folder.checkpoints.iterdir())
    # Whoever mends the scorer goes on from there.
    failing(tmp_path, "False")
    assert go_on(config, tmp_path / "run").status()["iteration"] == 3


def test_before_training_a_scorer_that_fails_is_no_run(tmp_path: Path) -> None:
    config = small_config(*failing(tmp_path, "len(CALLS) > 2"))
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with pytest.raises(ScorerError, match="before training: the scorer function") as caught:
        train(config, folder, Silent(), StopRequest())
    folder.close()
    assert caught.value.exit_code == 3


# How strictly -------------------------------------------------------------------------------------


def satisfaction_of_table(*overrides: str) -> tuple[float, float]:
    """The exact satisfaction of a table before and after training on the constraint alone."""
    config = compose([*_TRAINING, *_WITHOUT_CORPUS, *overrides])
    length = config.prompts.max_new_tokens
    parts = table_parts(_LETTERS, length, config)
    every = every_completion(parts.llm, length)
    holds = label(every, parts.scorers, config.constraint).satisfied_N.double()

    def rate() -> float:
        ids_NT, mask_NT = every.ids_NT, every.mask_NT
        stem = torch.zeros(len(ids_NT), 1, dtype=torch.long)
        with torch.no_grad():
            logits = parts.llm.module(input_ids=torch.cat([stem, ids_NT[:, :-1]], 1)).logits
        logprobs = logits.double().log_softmax(-1).gather(-1, ids_NT[..., None])[..., 0]
        return float((logprobs * mask_NT).sum(-1).exp() @ holds)

    before = rate()
    for iteration in range(1, config.trainer.iterations + 1):
        target = learn_target(parts, config, parts.llm.frozen(), iteration)
        update_llm(parts, target, config, iteration)
    return before, rate()


@pytest.mark.parametrize(
    ("overrides", "low", "high"),
    [
        ((), 0.99, 1.0),
        (("constraint.threshold=0.9",), 0.895, 0.905),
        (("constraint.labels=tilt", "constraint.target_mean=0.9"), 0.88, 0.92),
    ],
)
def test_a_table_ends_where_it_is_asked_to(
    overrides: tuple[str, ...], low: float, high: float
) -> None:
    before, after = satisfaction_of_table(*overrides, "prompts.samples_per_prompt=256")
    assert before < 0.8
    assert low < after < high


# Regimes ------------------------------------------------------------------------------------------


def measured(rate: float, quantiles: tuple[float, ...]) -> Evaluation:
    at = Interval(mean=rate, low=rate, high=rate)
    group: dict[str, Any] = dict.fromkeys(
        ("satisfaction", "violation", "score", "expected_maximum", "any_violation"), at
    )
    names = ("distinct_1", "distinct_2", "distinct_3", "length", "repetition", "empty")
    group |= dict.fromkeys(names, 1.0)
    group |= {name: {} for name in ("judges", "agreement", "violation_by_prompt", "terms")}
    result = GroupResult(prompts=50, samples=400, missing=0, self_bleu=None, **group)
    return Evaluation(
        model="base",
        groups={"all": result},
        perplexity={},
        kl_to_base=None,
        quantiles=quantiles,
        seconds_per_score=0.001,
        scorer="s",
        judges={},
        apart={},
        untruncated={},
        said_perplexity={},
    )


GRADED = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8)
BINARY = (0.0,) * 8 + (1.0,)


@pytest.mark.parametrize(
    ("rate", "quantiles", "words"),
    [
        (0.5, GRADED, None),
        (
            0.005,
            GRADED,
            "rarely satisfied by the base model (0.5%); proposal: constraint.anneal=0.2",
        ),
        (0.005, BINARY, "prompts.samples_per_prompt=16 prompts.guided_roll_ins=0.3"),
        (0.995, tuple(reversed([1 - q for q in GRADED])), "nearly always satisfied"),
        (0.995, BINARY, "prompts.samples_per_prompt=16 auxiliary.balanced=true"),
    ],
)
def test_the_regime_is_noticed_and_a_setting_proposed(
    rate: float, quantiles: tuple[float, ...], words: str | None
) -> None:
    config = compose([*SMALL, "constraint=letters"])
    said = advice(measured(rate, tuple(sorted(quantiles))), config)
    assert (said is None) if words is None else (said is not None and words in said)
    if said is not None:
        # What is proposed composes, and then nothing more is said of it.
        compose([*SMALL, "constraint=letters", *said.partition("proposal: ")[2].split()])


def test_a_stricter_bar_is_that_of_the_worst_tenth() -> None:
    config = compose([*SMALL, "constraint=letters"])
    quantiles = (0.6, 0.7, 0.8123, 0.85, 0.9, 0.95, 0.99, 1.0, 1.0)
    said = advice(measured(0.999, quantiles), config)
    assert said is not None
    assert said.endswith("proposal: constraint.satisfied_at=0.813 prompts.candidates=4")


def test_a_constraint_that_never_holds_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = small_config(
        "constraint=regex",
        "constraint.scorer.pattern=never-ever",
        "constraint.scorer.must=contain",
    )
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    parts = small_parts(config)
    with pytest.raises(ScorerError, match="in 0 of 40 probe samples"):
        preflight.look_before(parts, config, folder)
    folder.close()
