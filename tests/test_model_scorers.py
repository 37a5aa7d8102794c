"""Scorers with a model of their own, held against transformers used plainly."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    pipeline,
)

from constrained_ft.errors import DataError, ModelError, ScorerError
from constrained_ft.fused import Head
from constrained_ft.score import Item, fit_command
from constrained_ft.scorer_config import (
    ClassifierScorerConfig,
    EmbeddingScorerConfig,
    SelfJudgeScorerConfig,
)
from constrained_ft.scorers import build_scorer, probe, score_all
from constrained_ft.tiny import byte_tokenizer, tiny_model

TEXTS = ["You are kind.", "a", "What a long and winding road it was!", "no", "ü€"]
PROMPTS = ["He said: ", "", "Then", "x", "y"]


def bert(**settings: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.5,
        **settings,
    )


def saved(model: Any, folder: Path) -> str:
    model.eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    torch.manual_seed(0)  # transformers draws from the global stream
    names = {0: "fine", 1: "rude", 2: "threat"}
    config = bert(id2label=names, label2id={v: k for k, v in names.items()})
    return saved(BertForSequenceClassification(config), tmp_path / "classifier")


def hf(path: str, **keys: Any) -> ClassifierScorerConfig:
    return ClassifierScorerConfig(kind="hf", model_name_or_path=path, **keys)


def by_pipeline(path: str, texts: Any, **keys: Any) -> list[dict[str, float]]:
    classify: Any = pipeline("text-classification", model=path, top_k=None, **keys)
    return [{one["label"]: one["score"] for one in row} for row in classify(texts)]


# Classifiers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_classifier_scores_as_the_pipeline_does(classifier: str, batch_size: int) -> None:
    plain = by_pipeline(classifier, TEXTS)
    scorer = build_scorer(hf(classifier, labels=("rude", "threat"), batch_size=batch_size))
    probe(scorer)
    wanted = [1 - row["rude"] - row["threat"] for row in plain]
    assert score_all(scorer, PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)
    fine = build_scorer(hf(classifier, labels=("fine",), higher_is="satisfied"))
    assert score_all(fine, PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)


def test_a_classifier_in_a_thread_waits_while_products_are_rounded(classifier: str) -> None:
    scorer = build_scorer(hf(classifier, labels=("fine",), higher_is="satisfied"))
    alone = score_all(scorer, PROMPTS, TEXTS)
    head = Head(weight_VD=torch.randn(8, 4), bias_V=None, bf16_valued=True)
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    usual = products.fp32_precision
    with ThreadPoolExecutor(1) as threads:
        with head.fast_products():
            assert products.fp32_precision == "bf16"
            meanwhile = threads.submit(score_all, scorer, PROMPTS, TEXTS)
            with pytest.raises(TimeoutError):
                meanwhile.result(timeout=0.3)
        assert meanwhile.result() == alone
    assert products.fp32_precision == usual


def test_what_is_classified_can_be_chosen(classifier: str) -> None:
    joined = by_pipeline(classifier, [p + t for p, t in zip(PROMPTS, TEXTS, strict=True)])
    pairs = [{"text": p, "text_pair": t} for p, t in zip(PROMPTS, TEXTS, strict=True)]
    paired = by_pipeline(classifier, pairs)
    for text, plain in (("prompt_and_completion", joined), ("pair", paired)):
        scorer = build_scorer(hf(classifier, labels=("fine",), higher_is="satisfied", text=text))
        wanted = [row["fine"] for row in plain]
        assert score_all(scorer, PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)


def test_of_independent_labels_the_largest_counts(tmp_path: Path) -> None:
    torch.manual_seed(1)
    names = {0: "rude", 1: "threat"}
    config = bert(id2label=names, problem_type="multi_label_classification")
    path = saved(BertForSequenceClassification(config), tmp_path / "several")
    plain = by_pipeline(path, TEXTS, function_to_apply="sigmoid")
    scorer = build_scorer(hf(path, labels=("rude", "threat")))
    wanted = [1 - max(row.values()) for row in plain]
    assert score_all(scorer, PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)


def test_nothing_at_all_has_a_score_too(classifier: str) -> None:
    scorer = build_scorer(hf(classifier, labels=("rude",)))
    assert len(score_all(scorer, ["", ""], ["", "a"])) == 2


def test_the_version_follows_weights_and_settings(classifier: str, tmp_path: Path) -> None:
    first = build_scorer(hf(classifier, labels=("rude",))).version
    assert build_scorer(hf(classifier, labels=("rude",), batch_size=2)).version == first
    assert build_scorer(hf(classifier, labels=("threat",))).version != first
    torch.manual_seed(5)
    names = {0: "fine", 1: "rude", 2: "threat"}
    other = saved(BertForSequenceClassification(bert(id2label=names)), tmp_path / "other")
    assert build_scorer(hf(other, labels=("rude",))).version != first


def test_classifiers_that_cannot_be_used_are_refused(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="has the labels fine, rude, threat; got"):
        build_scorer(hf(classifier, labels=("toxic",)))
    with pytest.raises(ModelError, match="there is no model folder"):
        build_scorer(hf(str(tmp_path / "nowhere"), labels=("toxic",)))
    (Path(classifier) / "model.safetensors").rename(Path(classifier) / "model.bin")
    with pytest.raises(ModelError, match="as pickle"):
        build_scorer(hf(classifier, labels=("rude",)))
    if not torch.cuda.is_available():
        (Path(classifier) / "model.bin").rename(Path(classifier) / "model.safetensors")
        with pytest.raises(ScorerError, match="torch sees no GPU here"):
            build_scorer(hf(classifier, labels=("rude",), device="cuda"))


# Embeddings ---------------------------------------------------------------------------------------


@pytest.fixture
def embedder(tmp_path: Path) -> str:
    torch.manual_seed(2)
    return saved(BertModel(bert()), tmp_path / "embedder")


def plainly(path: str, text: str) -> np.ndarray:
    """The mean of the last hidden states of one text, of length 1."""
    model, tokenizer = AutoModel.from_pretrained(path).eval(), byte_tokenizer()
    ids = torch.tensor([tokenizer(text or ".")["input_ids"]])
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0).double().numpy()
    unit: np.ndarray = mean / np.linalg.norm(mean)
    return unit


def test_nearness_is_the_cosine_to_the_nearest_example(embedder: str) -> None:
    examples = ("How kind of you.", "Roads are long.")
    config = EmbeddingScorerConfig(
        kind="embedding", model_name_or_path=embedder, references=examples, batch_size=2
    )
    scorer = build_scorer(config)
    probe(scorer)
    near = [max(plainly(embedder, t) @ plainly(embedder, e) for e in examples) for t in TEXTS]
    wanted = np.clip(near, 0, 1)
    assert score_all(scorer, PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)
    far = build_scorer(config.model_copy(update={"higher_is": "violated"}))
    assert score_all(far, PROMPTS, TEXTS) == pytest.approx(1 - wanted, abs=1e-5)


def test_a_probe_is_a_logistic_regression_on_the_embeddings(embedder: str, tmp_path: Path) -> None:
    texts = [f"{word} number {i}" for i in range(40) for word in ("good", "bad!!")]
    items = [
        Item(prompt="", completion=text, label=text.startswith("good"), where=str(i))
        for i, text in enumerate(texts)
    ]
    embedding = EmbeddingScorerConfig(
        kind="embedding", model_name_or_path=embedder, references=("none",)
    )
    facts = fit_command(items, embedding, tmp_path / "probe")
    assert facts["auroc"] > 0.95
    tree = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert tree["model_name_or_path"] == embedder
    scorer = build_scorer(EmbeddingScorerConfig(kind="embedding", probe=str(tmp_path / "probe")))
    found = np.array(score_all(scorer, [""] * 80, texts))
    # The same problem for scikit-learn: its C is 1 / (2 x penalty x rows), the labels are balanced.
    from constrained_ft.order import held_out_by_hash

    kept = ~np.array(held_out_by_hash(texts, 0.25))
    states = np.stack([plainly(embedder, text) for text in texts])
    labels = np.array([item.label for item in items])
    reference = LogisticRegression(
        C=1 / (2 * 1e-3 * kept.sum()), class_weight="balanced", tol=1e-10, max_iter=10_000
    ).fit(states[kept], labels[kept])
    assert found == pytest.approx(reference.predict_proba(states)[:, 1], abs=0.01)


def test_probes_that_cannot_be_used_are_refused(embedder: str, tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="holds no probe"):
        build_scorer(EmbeddingScorerConfig(kind="embedding", probe=str(tmp_path)))
    embedding = EmbeddingScorerConfig(
        kind="embedding", model_name_or_path=embedder, references=("none",)
    )
    same = [Item(prompt="", completion=str(i), label=True, where="x") for i in range(20)]
    with pytest.raises(DataError, match="do not have both labels"):
        fit_command(same, embedding, tmp_path / "probe")
    unlabelled = [Item(prompt="", completion="a", label=None, where="rows.jsonl, row 1")]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1 has no `label`"):
        fit_command(unlabelled, embedding, tmp_path / "probe")


# A judging LLM ------------------------------------------------------------------------------------


def test_a_judge_s_score_is_its_share_of_yes(tmp_path: Path) -> None:
    path = saved(tiny_model("llama", seed=3), tmp_path / "judge")
    template = "Text: {prompt}{completion}\nPolite?"
    config = SelfJudgeScorerConfig(
        kind="llm_self",
        model_name_or_path=path,
        template=template,
        answer_yes="Yes",
        answer_no="No",
        batch_size=2,
    )
    scorer = build_scorer(config)
    probe(scorer)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), byte_tokenizer()
    wanted = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        ids = tokenizer(template.replace("{prompt}", prompt).replace("{completion}", text))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids["input_ids"]])).logits[0, -1]
        yes, no = (int(tokenizer(word)["input_ids"][0]) for word in ("Yes", "No"))
        wanted.append(float(logits[[yes, no]].softmax(-1)[0]))
    assert score_all(scorer, PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)
    # A completion that looks like a template is a text like any other.
    assert len(score_all(scorer, ["{completion}"], ["{prompt}"])) == 1
    with pytest.raises(ScorerError, match="begin with the same token"):
        build_scorer(config.model_copy(update={"answer_no": "Yellow"}))
