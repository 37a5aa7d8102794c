"""Scripts that measure: their runs compose, their pages say what was measured, the law holds."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import check_cost
import compare_classifiers
import comparison
import comparison_page
import lambda_law
import numpy as np
import pytest
import reproduce
import time_to_reduction
import torch
from sklearn.metrics import accuracy_score, f1_score
from test_detection import detection_of
from transformers import PreTrainedTokenizerBase

from constrained_ft import sizing
from constrained_ft.compose import compose
from constrained_ft.detection import load_questions
from constrained_ft.tiny import byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[1]


def test_every_cell_is_a_run_of_its_own_that_composes() -> None:
    cells = comparison.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        command, *overrides = cell.train(Path("root"))
        config = compose(overrides)
        assert command == "train"
        assert Path(config.output_dir) == Path("root") / cell.name
        assert config.seed == cell.seed
        steps = config.trainer.iterations * config.trainer.steps_per_iteration
        longer = cell.method.name.endswith("-longer")
        assert steps == 2 * (comparison.AS_LONG if longer else comparison.ITERATIONS)
    main = [cell for cell in cells if cell.scenario == "toxic" and cell.method in comparison.MAIN]
    assert sorted({cell.seed for cell in main}) == [0, 1, 2]


@pytest.mark.parametrize("weighed", comparison.WEIGHED, ids=lambda one: one.method.name)
def test_every_method_that_weighs_something_is_tried_at_three_weights(
    weighed: comparison.Weighed,
) -> None:
    methods = weighed.methods()
    found = [attrgetter(weighed.key)(compose(method.overrides)) for method in methods.values()]
    assert found == list(methods) == list(weighed.weights)
    assert methods[weighed.weights[1]] == weighed.method
    named = {cell.method.name for cell in comparison.cells() if cell.scenario == "toxic"}
    assert {method.name for method in methods.values()} <= named


def model(shares: dict[str, float], perplexity: float | None) -> dict[str, Any]:
    mean = float(np.mean(list(shares.values())))
    interval = {"mean": mean, "low": mean / 2, "high": mean * 2}
    group: dict[str, Any] = {"violation": interval, "any_violation": interval}
    group |= {"judges": {"judge": interval}, "violation_by_prompt": shares}
    group |= {"distinct_2": 0.75, "empty": 0.01, "length": 18.0}
    of_text = {} if perplexity is None else {"news": {"mean": perplexity}}
    return {"groups": {"prompts": group}, "perplexity": of_text, "detection": {}}


PLAIN = {f"p{i}": 0.2 + 0.01 * (i % 3) for i in range(40)}


def measured_run(folder: Path, *models: dict[str, Any]) -> None:
    """What a run and its measurement leave behind."""
    folder.mkdir(parents=True)
    (folder / "measured.json").write_text(json.dumps({"models": models, "differences": []}))
    row = {"budget/seconds": 61.4, "budget/scored_samples": 512, "budget/trained_tokens": 9e4}
    row |= {"budget/scored_texts": 300}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "phases.json").write_text(json.dumps({"phases": {"sampling": {"seconds": 20}}}))
    made = {"processor": "a CPU, 2 cores", "threads": 1, "versions": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(made | {"git_revision": "0123abc"}))
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Records and a page of their own; what the page says of them."""
    monkeypatch.setattr(comparison, "RECORDS", tmp_path / "r.jsonl")
    monkeypatch.setattr(comparison_page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(comparison_page, "FRONT", tmp_path / "front.svg")

    def rendered() -> str:
        comparison_page.render()
        return (tmp_path / "results.md").read_text(encoding="utf-8")

    return rendered


def test_the_page_says_what_was_measured(tmp_path: Path, page: Callable[[], str]) -> None:
    controlled = {name: share - 0.15 for name, share in PLAIN.items()}
    measured = {
        "toxic/sft/0": [model(PLAIN, 28.0)],
        "toxic/cft/0": [model({"p0": 0.1}, 36.0), model(controlled, 28.5)],
        "toxic/cft/1": [model(dict.fromkeys(PLAIN, 0.08), 29.5)],
        "toxic/lambda-4/0": [model(dict.fromkeys(PLAIN, 0.15), 28.1)],
        "toxic/lambda-40/0": [model(dict.fromkeys(PLAIN, 0.02), 30.0)],
    }
    for name, models in measured.items():
        measured_run(tmp_path / name, *models)
    for name in measured:
        reproduce.run(tmp_path, name, math.inf)
    # What stands in the file is not done again, and needs the folders no longer.
    for name in measured:
        shutil.rmtree(tmp_path / name)
        reproduce.run(tmp_path, name, math.inf)
    said = comparison.extra_command("toxic/decoding", Path("comparison"))
    models = [model(PLAIN, 36.0), model(PLAIN, 28.0), model(controlled, None), model(PLAIN, 28.0)]
    row = {"name": "toxic/decoding", "commands": [f"cft {shlex.join(said)}"], "models": models}
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    text = page()
    row_of_cft, *weights = [line for line in text.splitlines() if line.startswith("| cft |")]
    # Two seeds: 5.97 % and 8 %; 15 and 13 points below plain fine-tuning on every prompt.
    assert re.search(r"7\.0 % \(6\.\d–7\.\d; 6\.0 8\.0\)", row_of_cft)
    assert "-14.0" in row_of_cft
    assert "p < 0.001" in row_of_cft
    assert "29.00 (28.50 29.50)" in row_of_cft
    # Of three, one is within 2 % of plain fine-tuning's 28.00.
    assert [line.split(" | ")[1] for line in weights] == ["4", "12", "40"]
    assert [line.endswith("| chosen |") for line in weights] == [True, False, False]
    assert "| 28.10 | +0.4 % |" in weights[0]
    assert "| lambda-4 |" not in text
    assert "| base | 10.0 %" in text
    assert "- sft: more toxic, +14.0 (" in text
    assert "cft / sft = 0.33. Perplexity 28.00 against 29.00, cft +3.6 %\n" in text
    assert "sft, R guides = 1.17. Not measured at held-out news" in text
    machine = "a CPU, 2 cores, OMP_NUM_THREADS=1, torch 2.13.0"
    assert f"| toxic/cft/1 | 61 | 20 | 512 | 300 | 90,000 | {machine} | 0123abc |" in text
    assert "toxic/cft/2" in text.partition("Not run yet: ")[2]
    assert "The same cell again" not in text
    assert (tmp_path / "front.svg").stat().st_size > 1000


def test_a_cell_is_measured_again_where_that_is_asked_for(
    tmp_path: Path, page: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_run(tmp_path / "toxic/sft/0", model(dict.fromkeys(PLAIN, 0.2), 28.0))
    reproduce.run(tmp_path, "toxic/sft/0", math.inf)
    for number, share in enumerate((0.3, 0.5)):
        root = tmp_path / str(number)
        measured_run(root / "toxic/sft/0", model(dict.fromkeys(PLAIN, share), 28.1))
        kept = (root / "toxic/sft/0/measured.json").rename(tmp_path / "measured.json")

        def measured(_: object, folder: Path, kept: Path = kept) -> Path:
            return kept.rename(folder / "measured.json")

        monkeypatch.setattr(reproduce, "_cft", measured)
        for _ in range(2):  # once in a folder
            reproduce.again(root, "toxic", math.inf)
    text = page()
    first, second, third = [x for x in text.splitlines() if x.startswith("| toxic/sft/0 | ")][:3]
    assert "| 20.0 % (10.0–40.0) |  | 28.00 |" in first
    assert "| 30.0 % (15.0–60.0) | yes | 28.10 |" in second
    assert "| 50.0 % (25.0–100.0) | **no** | 28.10 |" in third
    (row,) = [line for line in text.splitlines() if line.startswith("| sft |")]
    assert row.startswith("| sft | 50.0 %")


@pytest.mark.slow
def test_training_comes_to_rest_where_the_law_of_lambda_says() -> None:
    corpus, measured = lambda_law.rest(3.0, "trainer.iterations=8")
    assert 0.5 < corpus < 0.8
    assert measured == pytest.approx((corpus + 3) / 4, abs=0.02)


@pytest.mark.slow
def test_a_dry_run_reckons_with_what_was_fitted_and_every_case_composes() -> None:
    for case in check_cost.CASES.values():
        compose([*check_cost.SHORT, *case.overrides])
    assert check_cost.fitted() == (sizing.REACHED, sizing.UNUSED)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert check_cost.check_tables() in page
    assert check_cost.plan_table() in page


def points(*rows: tuple[float, float, float, float]) -> list[dict[str, float]]:
    """By seconds, scored completions, violations and perplexity."""
    names = ("seconds", "scored_samples", "violation", "perplexity")
    rest = {"scored_texts": 0.0, "trained_tokens": 0.0, "toxicity": 0.1, "length": 18.0}
    return [dict(zip(names, row, strict=True)) | rest for row in rows]


def test_the_time_to_half_is_where_two_measurements_in_a_row_are_below_it(tmp_path: Path) -> None:
    base = time_to_reduction.Point(**points((0, 0, 0.2, 30))[0])
    curves = {
        # Below half from the line between 20 s and 40 s on; one measurement below is chance.
        "cft": {
            "cft-0-seed0": points((20, 64, 0.15, 30), (40, 128, 0.05, 30), (60, 192, 0.05, 30))
        },
        "grpo": {"grpo-0-seed0": points((50, 64, 0.09, 30), (90, 128, 0.19, 30))},
        "rloo": {
            "rloo-0-seed0": points((100, 64, 0.1, 31), (110, 99, 0.1, 31)),
            "rloo-1-seed0": points((200, 256, 0.1, 30), (210, 300, 0.1, 30)),
        },
    }
    files: dict[str, dict[str, Path]] = {}
    for method, trials in curves.items():
        for name, curve in trials.items():
            file = tmp_path / f"{name}.json"
            found = time_to_reduction.crossing(
                base, [time_to_reduction.Point(**one) for one in curve]
            )
            made = {"commit": "0123456789", "machine": "a CPU", "overrides": ["trainer.x=1"]}
            file.write_text(json.dumps(made | {"crossing": found, "points": curve}))
            files.setdefault(method, {})[name] = file
    tree = time_to_reduction.result(base, files, 0, ["OUT"])
    page = "\n".join(time_to_reduction.page(json.loads(json.dumps(tree))))
    assert "| cft-0-seed0: x=1 | 30 | 96 |" in page
    assert "| grpo-0-seed0: x=1 | not in 90 | not in 128 |" in page
    assert "31.00 (too high)" in page  # more than 2 % above 30, so the slower trial counts
    assert (
        "cft / rloo, medians of the quickest trial over its seeds: 0.15 of the time, 0.38" in page
    )
    assert "cft / grpo, whose trials did not come to half" in page
    assert "less than 0.33 of the time, less than 0.75 of the scored" in page
    time_to_reduction.plot(tree, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 1000


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, PreTrainedTokenizerBase]:
    tokenizer = byte_tokenizer()
    tiny_model("llama", seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), tokenizer


def test_a_classification_head_is_tuned_and_tells_texts_apart(
    saved: tuple[str, PreTrainedTokenizerBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_classifiers, "RATE", 5e-3)
    config = detection_of(tmp_path)
    untuned, tuned = (
        compare_classifiers.classifiers(saved[0], config, [0, 1], epochs) for epochs in (0, 6)
    )
    assert all(one.measures["AUROC"].mean < 0.75 for one in untuned)
    assert all(one.measures["AUROC"].mean > 0.95 for one in tuned)
    rows = list(compare_classifiers.table({"untuned": untuned, "tuned": tuned}))
    assert rows[2].startswith("| untuned | ")
    labels = [text in tuned[0].positives for text in tuned[0].scores]
    called = [[score >= one.threshold for score in one.scores.values()] for one in tuned]
    for place, measure in ((2, f1_score), (4, accuracy_score)):
        mean = np.mean([measure(labels, one) for one in called])
        assert rows[3].split(" | ")[place - 1].startswith(f"{mean:.3f} (")
    better = np.mean([one.measures["AUROC"].mean for one in tuned]) - np.mean(
        [one.measures["AUROC"].mean for one in untuned]
    )
    assert rows[3].split(" | ")[5].startswith(f"{100 * better:+.1f} (")


@torch.no_grad()
def test_the_head_reads_the_last_token_as_transformers_does(
    saved: tuple[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    folder, tokenizer = saved
    classifier = compare_classifiers.Classifier(folder, seed=0)
    questions = load_questions(detection_of(tmp_path), tokenizer, None).held_out[:7]
    ours = classifier.tell_apart(questions)
    for one in questions:
        theirs = classifier.module(input_ids=torch.tensor([one.token_ids])).logits[0]
        assert ours[one.id] == pytest.approx(float(theirs[1] - theirs[0]), abs=0.02)
