"""Telling labelled texts apart: the questions, the measures, and what a model learns of it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several import together
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from small import SHAPES, run, small_config, tiny_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from constrained_ft import paired, results
from constrained_ft.classification import Classification, classification, measured
from constrained_ft.compare import evaluate_command
from constrained_ft.compose import compose
from constrained_ft.config import DataConfig, DetectionConfig, PromptsConfig, QuestionConfig
from constrained_ft.corpus import load_corpus
from constrained_ft.detection import detect, load_questions, probe_scores, read
from constrained_ft.distributed import StopRequest, World
from constrained_ft.errors import ConfigError, DataError
from constrained_ft.progress import Silent
from constrained_ft.prompts import load_prompts
from constrained_ft.sources import check_sources
from constrained_ft.tiny import byte_tokenizer

ASK = {"label": "bad", "template": "{text}?", "positive": "yes", "negative": "no"}
WORDS = ("lamp", "tree", "cloud", "stone", "river", "paper", "grass", "night", "shoe", "bread")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    """Three words; a text is bad when it speaks of a river or of grass, half of all or so."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 3)) for _ in range(count)]
    return [{"text": text, "bad": float("river" in text or "grass" in text)} for text in texts]


def detection_of(tmp_path: Path, **changes: Any) -> DetectionConfig:
    training = write_jsonl(tmp_path / "training.jsonl", labelled(240, 0))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", labelled(90, 1))
    tree = {
        "question": ASK,
        "training": {"path": training},
        "held_out": {"path": held_out},
        "probe": True,
    }
    return DetectionConfig.model_validate(tree | changes)


# Questions ----------------------------------------------------------------------------------------


def asked(tmp_path: Path, rows: list[dict[str, Any]], **question: Any) -> list[str]:
    """The rows of a corpus of labelled texts, the trained part behind a bar."""
    source = {"path": write_jsonl(tmp_path / "rows.jsonl", rows), "question": ASK | question}
    config = DataConfig.model_validate(
        {"sources": {"a": source}, "max_length": 64, "validation_share": 0}
    )
    tokenizer = byte_tokenizer()
    found = []
    for row in load_corpus(config, tokenizer).training:
        first = row.trained.index(True)
        assert row.prompted
        assert all(row.trained[first:])
        assert row.token_ids[-1] == tokenizer.eos_token_id
        sides = (row.token_ids[:first], row.token_ids[first:-1])
        found.append("|".join(str(tokenizer.decode(side)) for side in sides))
    return found


def test_labelled_texts_become_questions_whose_answer_is_trained(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "{a}", "bad": 0.5},
        {"text": "b", "bad": 0.49},
        {"text": "c", "bad": True},
        {"text": "d", "bad": False},
        {"text": "e", "bad": 1},
    ]
    numbers = [row | {"bad": float(row["bad"])} for row in rows]
    assert asked(tmp_path, numbers) == ["{a}?|yes", "b?|no", "c?|yes", "d?|no", "e?|yes"]
    assert asked(tmp_path, rows[2:4]) == ["c?|yes", "d?|no"]
    nested = [{"text": "b", "scores": {"hate": 0.3}}]
    assert asked(tmp_path, nested, label="scores.hate", positive_from=0.3) == ["b?|yes"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "row 1 of .* has no `bad`, which `question.label` asks for"),
        ({"text": "a", "bad": "very"}, "the label `bad` is 'very', but must be a number"),
        ({"text": "a", "bad": "nan"}, "the label `bad` is 'nan', but must be a number"),
        ({"prompt": "a", "completion": "b", "bad": 1}, "row 1 of .* is no plain text"),
    ],
)
def test_a_row_that_cannot_be_asked_about_is_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        asked(tmp_path, [row])


def test_a_question_has_a_text_and_two_answers() -> None:
    with pytest.raises(ValueError, match=r"template has no \{text\}"):
        QuestionConfig.model_validate(ASK | {"template": "?"})
    for negative in ("yes", " yes ", " "):
        with pytest.raises(ValueError, match="must be two different answers"):
            QuestionConfig.model_validate(ASK | {"negative": negative})


def test_prompts_have_no_question(tmp_path: Path) -> None:
    source = {"path": write_jsonl(tmp_path / "p.jsonl", labelled(9, 0)), "question": ASK}
    prompts = compose(["experiment=smoke"]).prompts.model_dump()
    config = PromptsConfig.model_validate(
        prompts | {"from_corpus": False, "sources": {"a": source}}
    )
    with pytest.raises(ConfigError, match="`question` of a is for the corpus"):
        load_prompts(config, byte_tokenizer(), compose(["experiment=smoke"]).data, None)


def test_no_text_is_on_both_sides_and_none_comes_twice(tmp_path: Path) -> None:
    rows = [{"text": text, "bad": i % 2} for i, text in enumerate("abcdef")]
    config = detection_of(
        tmp_path,
        training={"path": write_jsonl(tmp_path / "t.jsonl", [*rows[:3], *rows[:2]])},
        held_out={"path": write_jsonl(tmp_path / "h.jsonl", [*rows[2:], rows[5]])},
    )
    questions = load_questions(config, byte_tokenizer(), None)
    assert [question.positive for question in questions.training] == [False, True, False]
    assert [question.positive for question in questions.held_out] == [True, False, True]
    assert not {q.id for q in questions.training} & {q.id for q in questions.held_out}


def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"path": write_jsonl(tmp_path / "one.jsonl", [{"text": "a", "bad": 0}])}
    with pytest.raises(DataError, match=r"detection\.held_out: 1 texts, which are not of both"):
        load_questions(detection_of(tmp_path, held_out=one), byte_tokenizer(), None)
    with pytest.raises(DataError, match=r"detection\.training: 1 texts"):
        load_questions(detection_of(tmp_path, training=one), byte_tokenizer(), None)
    with pytest.raises(DataError, match=r"context is 12: set .*training\.opening_words"):
        load_questions(detection_of(tmp_path), byte_tokenizer(), 12)
    missing = detection_of(tmp_path, held_out={"path": str(tmp_path / "no.jsonl")})
    small = small_config()
    with pytest.raises(DataError, match=r"^evaluation\.detection\.held_out\.path: there is no"):
        check_sources(small.data, small.prompts, missing)
    with pytest.raises(ValueError, match=r"training\.question: `question` beside it"):
        detection_of(tmp_path, training=one | {"question": ASK})
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'constrained-ft\[demo\]'"):
        load_questions(detection_of(tmp_path), byte_tokenizer(), None)
    load_questions(detection_of(tmp_path, probe=False), byte_tokenizer(), None)


def test_the_shipped_detector_is_measured_as_it_is_trained() -> None:
    config = compose(["experiment=multi_task"])
    measured, trained = config.evaluation.detection, config.data.sources["detection"]
    assert measured is not None
    assert measured.question == trained.question
    asked_once = trained.model_copy(update={"question": None, "repeat": 1, "weight": 1.0})
    assert measured.training == asked_once
    assert measured.held_out.path == trained.path
    assert measured.held_out.first_row >= trained.last_row >= 500


# Measures -----------------------------------------------------------------------------------------


def of_scores(labels: Sequence[int], scores: Sequence[float], share: float) -> Classification:
    positives = frozenset(str(i) for i, label in enumerate(labels) if label)
    return classification({str(i): score for i, score in enumerate(scores)}, positives, share)


def test_measures_by_hand() -> None:
    # Two of five texts are called positive, one of them rightly; of the six pairs of a positive and
    # a negative text four are in order and one is a tie.
    found = of_scores([1, 0, 1, 0, 0], [3.0, 2.0, 1.0, 1.0, 0.0], 0.4)
    assert found.threshold == 2.0
    assert found.measures["F1"].mean == pytest.approx(2 * 1 / (2 + 2))
    assert found.measures["AUROC"].mean == pytest.approx((3 + 1 + 0.5) / 6)
    assert found.measures["accuracy"].mean == pytest.approx(3 / 5)
    assert (found.texts, found.positive, found.positives) == (5, 0.4, ("0", "2"))


@pytest.mark.parametrize("seed", range(3))
def test_measures_of_any_sample_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(80) < 0.3
    scores = np.round(rng.normal(labels * 1.0, 1.0), 1)  # with ties
    threshold = float(np.quantile(scores, 0.7))
    draws = rng.integers(80, size=(20, 80))
    counts = np.array([np.bincount(draw, minlength=80) for draw in draws], dtype=float)
    found = measured(labels, scores, threshold, counts)
    for i, draw in enumerate(draws):
        truth, said = labels[draw], scores[draw]
        assert found["F1"][i] == pytest.approx(f1_score(truth, said >= threshold))
        assert found["AUROC"][i] == pytest.approx(roc_auc_score(truth, said))
        assert found["accuracy"][i] == pytest.approx(accuracy_score(truth, said >= threshold))


def test_a_sample_of_one_class_has_no_measure() -> None:
    counts = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    found = measured(np.array([True, True, False]), np.array([2.0, 1.0, 0.0]), 1.5, counts)
    assert np.isnan(found["AUROC"]).tolist() == [True, False]
    assert found["F1"][1] == found["accuracy"][1] == 1.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # AUROC of two normal distributions a standard deviation apart: Phi(1 / sqrt 2).
    truth, inside = 0.7602, 0
    rng = np.random.default_rng(0)
    for _ in range(40):
        labels = rng.random(120) < 0.3
        found = of_scores(labels.tolist(), rng.normal(labels * 1.0, 1.0).tolist(), 0.3)
        inside += found.measures["AUROC"].low <= truth <= found.measures["AUROC"].high
    assert 34 <= inside <= 40


def test_a_probe_tells_apart_what_a_direction_tells_apart() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 20)) * np.logspace(-3, 3, 20)
    labels = features[:, 0] / 1e-3 + features[:, 19] / 1e3 > 0.5
    scores = probe_scores(features[:200], labels[:200], features[200:])
    assert roc_auc_score(labels[200:], scores) > 0.95


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_features_are_those_of_plain_transformers(tmp_path: Path, shape: str) -> None:
    llm = tiny_llm(shape, sharpness=20.0)
    config = detection_of(tmp_path, probe=False)
    questions = load_questions(config, llm.tokenizer, None)
    scores, features = read(
        llm.frozen(), questions.held_out, Silent(), StopRequest(), World.alone()
    )
    lines = Path(str(config.held_out.path)).read_text().splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    for place, question in enumerate(questions.held_out[:8]):
        ids = list(question.token_ids)
        assert llm.tokenizer.decode(ids, skip_special_tokens=True).removesuffix("?") in texts
        with torch.no_grad():
            hidden = llm.module.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert features[place] == pytest.approx(hidden.double().numpy(), abs=2e-4)
        sums = [log_probability(llm.module, ids, llm.tokenizer, said) for said in ("yes", "no")]
        assert scores["answers"][place] == pytest.approx(sums[0] - sums[1], abs=2e-3)


def log_probability(model: Any, ids: list[int], tokenizer: Any, completion: str) -> float:
    said = tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert len(said) > 1  # bytes
    whole = torch.tensor([[*ids, *said]])
    labels = whole.clone()
    labels[0, : len(ids)] = -100
    with torch.no_grad():
        return -float(model(input_ids=whole, labels=labels).loss) * len(said)


def on_ranks(world: World, stop: StopRequest, tree: dict[str, Any]) -> dict[str, Classification]:
    llm = tiny_llm()
    questions = load_questions(DetectionConfig.model_validate(tree), llm.tokenizer, None)
    return detect(llm.frozen(), questions, Silent(), stop, world)


def test_ranks_share_the_texts(tmp_path: Path) -> None:
    tree = detection_of(tmp_path).model_dump()
    alone = on_ranks(World.alone(), StopRequest(), tree)
    first, second = together(on_ranks, 2, tree)
    assert first == second
    for detector, found in first.items():
        assert found.scores == pytest.approx(alone[detector].scores, abs=1e-4)


# Whole --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plain run on questions alone."""
    folder = tmp_path_factory.mktemp("detection")
    detection = detection_of(folder)
    tree = small_config(
        "trainer=sft",
        "trainer.iterations=1",
        "trainer.steps_per_iteration=160",
        "trainer.warmup_steps=20",
        "trainer.per_device_train_batch_size=16",
        "trainer.learning_rate=3e-3",
        "evaluation.max_prompts=4",
        "prompts.prompts_per_iteration=4",
        "guard.min_entropy=0",  # it says yes or no
    ).model_dump()
    source = {"path": str(detection.training.path), "question": ASK}
    tree["data"] |= {"path": None, "format": "auto", "sources": {"questions": source}}
    tree["evaluation"] |= {"detection": detection.model_dump()}
    tree["auxiliary"] |= {"vocabulary_prior": False}
    config = type(small_config()).model_validate(tree)
    done = run(config, folder / "run")
    done.write_status("finished")
    return {
        "folder": done,
        "json": json.loads(done.evaluation_file.read_text()),
        "read": results.load(done.evaluation_file),
        "questions": load_questions(detection, byte_tokenizer(), None),
    }


def test_a_model_that_learns_to_answer_detects(trained: dict[str, Any]) -> None:
    base, tuned = trained["read"]
    assert base.detection["answers"].measures["AUROC"].mean < 0.75
    assert tuned.detection["answers"].measures["AUROC"].mean > 0.9
    assert (
        tuned.detection["answers"].measures["F1"].low
        > base.detection["answers"].measures["F1"].high
    )
    assert set(tuned.detection) == {"answers", "probe"}


def test_the_exported_model_answers_as_was_measured(trained: dict[str, Any]) -> None:
    path = trained["folder"].final_llm
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tuned = trained["read"][1].detection["answers"]
    for question in trained["questions"].held_out[:8]:
        yes, no = (
            log_probability(model, list(question.token_ids), tokenizer, said)
            for said in ("yes", "no")
        )
        assert tuned.scores[question.id] == pytest.approx(yes - no, abs=1e-3)


def test_differences_are_those_of_the_measures(trained: dict[str, Any]) -> None:
    base, tuned = trained["read"]
    found = {(d["group"], d["measure"]): d for d in trained["json"]["differences"]}
    for detector in ("answers", "probe"):
        for name in ("F1", "AUROC", "accuracy"):
            one = found[detector, name]
            mine = tuned.detection[detector].measures[name].mean
            theirs = base.detection[detector].measures[name].mean
            assert one["difference"]["mean"] == pytest.approx(mine - theirs)
            assert one["difference"]["low"] <= mine - theirs <= one["difference"]["high"]
            assert (one["prompts"], one["p_value"]) == (tuned.detection[detector].texts, None)
    # Of paired models the interval is narrower than of two that were measured apart.
    same = paired.differences([tuned, tuned])
    assert all(
        d.difference.low == d.difference.high == 0 for d in same if d.measure != "violations"
    )


def test_evaluating_again_gives_the_same_and_a_table(trained: dict[str, Any]) -> None:
    shown: dict[str, list[list[str]]] = {}

    class Tables(Silent):
        def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
            shown[title] = [list(row) for row in rows]

    again = evaluate_command(
        [str(trained["folder"].path)],
        prompts_file=None,
        output=None,
        max_prompts=None,
        samples_per_prompt=None,
        guided=True,
        seed=0,
        display=Tables(),
    )
    for one, recorded in zip(again, trained["read"], strict=False):
        for detector, found in one.detection.items():
            assert found.measures == recorded.detection[detector].measures
    assert again[2].detection == {}  # a detector is the model's own
    titles = {row[0].strip(): row[1:] for row in shown["Held-out prompts and text"]}
    tuned = again[1].detection["answers"]
    assert titles["detection, answers: texts (positive)"][1].startswith(f"{tuned.texts} (")
    assert titles["AUROC"][2] == "–"
    compared = [row[0] for row in shown["The same prompts and random numbers"]]
    assert any(title.startswith("F1 of answers: ") for title in compared)
