"""What is measured, against other libraries and plain transformers."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from huggingface_hub import ModelCard
from sklearn.metrics import cohen_kappa_score
from small import run, small_config, small_parts, tiny_llm

from constrained_ft import evaluate, paired, results
from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.compare import evaluate_command
from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.decoding import Guide
from constrained_ft.distributed import StopRequest
from constrained_ft.encoding import Encoder
from constrained_ft.evaluate import kappa
from constrained_ft.fluency import distinct, empty, repetition, self_bleu
from constrained_ft.llm import FrozenLLM
from constrained_ft.loading import load_frozen, plain_config
from constrained_ft.paired import sign_flip
from constrained_ft.perplexity import said_perplexity
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import seed_for
from constrained_ft.rollouts import Rollouts
from constrained_ft.sampling import sample

WIDE = (
    "evaluation.top_p=0.5",
    "evaluation.untruncated_samples=3",
    "evaluation.by_prompt=true",
    "evaluation.self_bleu=true",
    "evaluation.fluency_model=tiny:gpt2",
    "+evaluation.judges.short={scorer: {kind: length, unit: characters, at_most: 12}}",
    "+evaluation.judges.no_a={scorer: {kind: letters, letter: a, at_most: 0}}",
)


def completions(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    count: int,
    config: Config,
    seed: int,
    guide: Guide | None = None,
) -> Rollouts:
    return sample(
        llm,
        prompts,
        samples_per_prompt=count,
        max_new_tokens=config.prompts.max_new_tokens,
        sampler=config.sampler,
        seed=seed,
        iteration=0,
        display=Silent(),
        stop=StopRequest(),
        guide=guide,
    )


# Texts --------------------------------------------------------------------------------------------


def test_distinct_words_and_repetition_by_hand() -> None:
    texts = ["a b a b a b", "c d e", " "]
    assert distinct(texts, 1) == 5 / 9
    assert distinct(texts, 2) == 4 / 7
    # Of "abab", "baba", "abab" one stood there before; the second text is too short.
    assert repetition(texts) == pytest.approx(1 / 3)
    assert empty(texts) == 1 / 3
    assert distinct([""], 1) == repetition(["a b c"]) == 0.0


def test_self_bleu_is_that_of_equal_and_of_different_texts() -> None:
    same, other = "the cat sat on the mat", "a dog ran into some woods today"
    assert self_bleu([[same, same, same]]) == pytest.approx(100)
    assert self_bleu([[same, other]]) < 10
    assert self_bleu([[same]]) == 0.0
    mixed = self_bleu([[same, same], [same, other]])
    assert mixed == pytest.approx(50 + self_bleu([[same, other]]) / 2)


# Verdicts -----------------------------------------------------------------------------------------


def test_kappa_is_scikit_learn_s() -> None:
    rng = np.random.default_rng(0)
    one = (rng.random(200) < 0.3).astype(float)
    two = np.where(rng.random(200) < 0.7, one, rng.random(200) < 0.5).astype(float)
    assert kappa(one, two) == pytest.approx(cohen_kappa_score(one, two))
    missing = np.where(rng.random(200) < 0.1, np.nan, two)
    there = ~np.isnan(missing)
    assert kappa(one, missing) == pytest.approx(cohen_kappa_score(one[there], two[there]))
    assert kappa(np.zeros(5), np.zeros(5)) is None
    assert kappa(np.full(5, np.nan), np.zeros(5)) is None


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.6])
def test_the_p_value_is_that_of_the_permutation_test(shift: float) -> None:
    values = np.random.default_rng(3).normal(shift, 1.0, 12)
    exact = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(values) == pytest.approx(exact.pvalue, abs=0.015)


def test_no_difference_has_a_p_value_of_one() -> None:
    assert sign_flip(np.zeros(20)) == 1.0


# Perplexity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_the_perplexity_of_what_is_said_is_that_of_plain_transformers(shape: str) -> None:
    config = small_config()
    parts = small_parts(config)
    rollouts = completions(parts.llm.frozen(), parts.prompts.held_out[:6], 3, config, 0)
    reader = tiny_llm(shape, sharpness=20.0)
    found = said_perplexity(reader.frozen(), rollouts, StopRequest())
    encoder = Encoder(reader.tokenizer)
    total, count = 0.0, 0
    for place, prompt in enumerate(rollouts.prompts):
        rows = [i for i, p in enumerate(rollouts.prompt_N.tolist()) if p == place][:2]
        for row in rows:
            start, said = encoder.encode([prompt.text, rollouts.texts[row]])
            ids = torch.tensor([[*encoder.prefix, *start, *said]])
            labels = ids.clone()
            labels[0, : ids.shape[1] - len(said)] = -100
            with torch.no_grad():
                loss = reader.module(input_ids=ids, labels=labels).loss
            total, count = total + float(loss) * len(said), count + len(said)
    assert found.mean == pytest.approx(float(np.exp(total / count)), rel=1e-4)
    assert found.low < found.mean < found.high


# Whole --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = run(small_config(*WIDE), tmp_path_factory.mktemp("wide") / "run")
    folder.write_status("finished")
    tree: dict[str, Any] = json.loads(folder.evaluation_file.read_text())
    tree["read"] = results.load(folder.evaluation_file)
    tree["folder"] = folder.path
    return tree


def test_judges_stand_side_by_side(wide: dict[str, Any]) -> None:
    for model in wide["models"]:
        for group in model["groups"].values():
            assert set(group["judges"]) == {"short", "no_a"}
            pairs = {"constraint / short", "constraint / no_a", "short / no_a"}
            assert set(group["agreement"]) == pairs
            assert group["self_bleu"] >= 0
    assert set(wide["settings"]["judges"]) == {"short", "no_a"}
    titles = [row[0].strip() for row in results.table(wide["read"])[1]]
    for title in (
        "violations, judge short",
        "agreement (kappa), constraint / no_a",
        "violations, sampled from all tokens",
        "self-BLEU",
    ):
        assert title in titles


def test_prompts_that_violate_themselves_stand_apart(wide: dict[str, Any]) -> None:
    config = small_config(*WIDE)
    parts = small_parts(config)
    prompts = evaluate.choose_prompts(parts.prompts.held_out, config.evaluation.max_prompts)
    violating = {prompt.id for prompt in prompts if "e" in prompt.text.lower()}
    for model in wide["models"]:
        (name,) = model["groups"]
        whole, apart = model["groups"][name]["violation_by_prompt"], model["apart"]
        assert 0 < len(violating) <= len(prompts)
        sides = {"violating prompts": violating, "other prompts": set(whole) - violating}
        if not all(sides.values()):  # nothing to tell apart
            assert not apart
            continue
        for title, ids in sides.items():
            part = apart[f"{name}, {title}"]["violation_by_prompt"]
            assert part == {i: v for i, v in whole.items() if i in ids}


def test_untruncated_satisfaction_is_that_of_the_whole_distribution(wide: dict[str, Any]) -> None:
    config = small_config(*WIDE)
    parts = small_parts(config)
    rollouts = completions(
        parts.llm.frozen(),
        evaluate.choose_prompts(parts.prompts.held_out, config.evaluation.max_prompts),
        3,
        config,
        seed_for(config.seed, "evaluation"),
    )
    clean = ["e" not in text.lower() for text in rollouts.texts]
    (base,) = wide["models"][0]["untruncated"].values()
    assert base["mean"] == pytest.approx(sum(clean) / len(clean))
    (name,) = wide["models"][0]["groups"]
    truncated = wide["models"][0]["groups"][name]
    assert truncated["samples"] == truncated["prompts"] * config.evaluation.samples_per_prompt


def test_differences_are_those_of_the_prompts(wide: dict[str, Any]) -> None:
    base, tuned = wide["models"]
    (found,) = wide["differences"]
    mine = base["groups"][found["group"]]["violation_by_prompt"]
    theirs = tuned["groups"][found["group"]]["violation_by_prompt"]
    values = np.array([theirs[prompt] - mine[prompt] for prompt in mine])
    assert (found["model"], found["other"]) == ("tuned", "base")
    assert found["difference"]["mean"] == pytest.approx(values.mean())
    assert found["prompts"] == len(values)
    assert found["p_value"] == sign_flip(values)
    _, rows = paired.table(paired.differences(wide["read"]))
    assert rows[0][0] == f"violations, {found['group']}: tuned - base"


def test_a_model_that_is_not_the_base_reads_what_was_said(wide: dict[str, Any]) -> None:
    found = evaluate_command(
        [str(wide["folder"])],
        prompts_file=None,
        output=None,
        max_prompts=None,
        samples_per_prompt=None,
        seed=0,
        display=Silent(),
    )
    for one, recorded in zip(found, wide["read"], strict=True):
        assert one.groups == recorded.groups
        assert set(one.said_perplexity) == {"base", "other"}
        assert one.said_perplexity["base"].mean == pytest.approx(
            recorded.said_perplexity["base"].mean, rel=1e-5
        )
        assert one.said_perplexity["other"] != one.said_perplexity["base"]
    titles = [row[0].strip() for row in results.table(found)[1]]
    assert "perplexity of completions under another model" in titles


def test_decoding_time_control_has_columns_of_its_own(wide: dict[str, Any]) -> None:
    found = evaluate_command(
        [str(wide["folder"])],
        prompts_file=None,
        output=None,
        max_prompts=None,
        samples_per_prompt=4,
        evaluation="quick",
        guided=True,
        best_of=3,
        seed=0,
        display=Silent(),
    )
    names = [one.model for one in found]
    assert names == ["base", "run", "run, guided", "run, best of 3"]
    base, tuned, guided, best = (next(iter(one.groups.values())) for one in found)
    assert best.satisfaction.mean >= tuned.satisfaction.mean
    assert base.samples == best.samples == 4 * best.prompts
    assert found[2].perplexity == {}
    # By hand: with R at every token; three times as many completions, and of each three the best.
    config = small_config(*WIDE)
    parts = small_parts(config)
    llm = load_frozen(plain_config(str(wide["folder"] / "final" / "llm")), precision="fp32")
    auxiliary = FrozenAuxiliary.load(wide["folder"] / "final" / "auxiliary", llm.device)

    def clean(samples: int, guide: Guide | None) -> Any:
        rollouts = completions(
            llm, parts.prompts.held_out, samples, config, seed_for(0, "evaluation"), guide=guide
        )
        return np.array(["e" not in text.lower() for text in rollouts.texts])

    assert guided.satisfaction.mean == pytest.approx(clean(4, auxiliary.guide()).mean())
    assert best.satisfaction.mean == pytest.approx(
        clean(12, None).reshape(-1, 3).max(axis=1).mean()
    )


def test_the_exported_model_carries_a_card(wide: dict[str, Any]) -> None:
    file = wide["folder"] / "final" / "llm" / "README.md"
    card = ModelCard.load(file)  # as the hub reads it
    assert card.data.library_name == "transformers"
    assert "cft" in card.data.tags
    assert card.data.base_model is None  # a toy has no page on the hub
    assert str(wide["folder"]) not in card.content
    tuned = wide["read"][-1]
    (group,) = tuned.groups.values()
    assert group.violation.percent() in card.text
    assert tuned.scorer in card.text
    for judge in tuned.judges.values():
        assert judge in card.text


def test_the_full_protocol_composes() -> None:
    config = compose(["evaluation=full"])
    assert (config.evaluation.top_p, config.evaluation.samples_per_prompt) == (0.9, 25)
    assert list(config.evaluation.all_judges()) == ["judge", "better_profanity"]


def test_a_judge_s_name_is_taken_once() -> None:
    evaluation = compose(["evaluation=full"]).evaluation
    twice = dict(evaluation) | {"judges": {"judge": evaluation.judges["better_profanity"]}}
    with pytest.raises(ValueError, match=r"judges\.judge: this is the name of evaluation\.judge"):
        type(evaluation).model_validate(twice)
