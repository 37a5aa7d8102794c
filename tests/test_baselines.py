"""What the method is compared with: plain, filtered, rejection sampling."""

import json
from pathlib import Path

import pytest
import torch
from small import gradients, run, small_config, small_parts

from constrained_ft import metrics
from constrained_ft.compose import compose
from constrained_ft.errors import DataError
from constrained_ft.finetune import backward_of_step
from constrained_ft.model_card import _aim
from constrained_ft.target import learn_target

SHORT = (
    "constraint=length",
    "constraint.scorer.unit=words",
    "constraint.scorer.at_most=8",
    "constraint.labels=hard",
    "constraint.satisfied_at=1",
    "evaluation.judge=null",
)


def test_filtered_leaves_out_what_violates() -> None:
    parts = small_parts(small_config(*SHORT, "trainer=filtered"))
    whole = small_parts(small_config(*SHORT, "trainer=sft"))

    def words(corpus_rows: tuple[object, ...]) -> list[int]:
        decode = parts.llm.tokenizer.decode
        texts = [decode(r.token_ids, skip_special_tokens=True) for r in corpus_rows]  # type: ignore[attr-defined]
        return [len(str(text).split()) for text in texts]

    kept, all_rows = words(parts.corpus.training), words(whole.corpus.training)
    assert max(kept) <= 8 < max(all_rows)
    assert sorted(kept) == sorted(count for count in all_rows if count <= 8)
    assert parts.corpus.validation == whole.corpus.validation


def test_a_corpus_that_violates_as_a_whole_is_refused() -> None:
    with pytest.raises(DataError, match=r"trainer\.filter_corpus=true leaves no row"):
        small_parts(small_config(*SHORT, "trainer=filtered", "constraint.scorer.at_most=1"))


def test_plain_fine_tuning_samples_little(tmp_path: Path) -> None:
    config = small_config("trainer=sft", "trainer.iterations=2", "trainer.steps_per_iteration=2")
    config = config.model_copy(
        update={"trainer": config.trainer.model_copy(update={"warmup_steps": 1})}
    )
    assert config.trainer.kl_weight > 0  # the experiment's, which must not count
    folder = run(config, tmp_path / "run")
    for number in (1, 2):
        lines = folder.rollouts_file(number).read_text(encoding="utf-8").splitlines()
        assert len({json.loads(line)["prompt"] for line in lines}) == 4
    assert all(row["update/kl"] == 0 for row in metrics.read(folder.metrics_file))


def test_rejection_is_the_cross_entropy_of_what_was_accepted() -> None:
    config = small_config("trainer=rejection", "trainer.corpus=false", "trainer.kl_weight=2")
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    rollouts = target.rollouts
    rows = torch.arange(len(rollouts.prompt_N))
    backward_of_step(
        parts.llm, target, rows, [[()]], config.trainer, float(target.num_prompts), live=True
    )
    found = gradients(parts.llm)
    labels_N = {
        (prompt, text): float(label)
        for prompt, text, label in zip(
            parts.replay[0].rollouts.prompt_texts,
            parts.replay[0].rollouts.texts,
            parts.replay[0].labels_N,
            strict=True,
        )
    }
    total = torch.zeros(())
    for row in rows.tolist():
        prompt = rollouts.prompts[int(rollouts.prompt_N[row])]
        said = rollouts.ids_NT[row][rollouts.mask_NT[row]]
        if labels_N[prompt.text, rollouts.texts[row]] == 0:
            assert (target.weights_NT[row] == 0).all()
            continue
        ids = torch.tensor([[*prompt.token_ids, *said.tolist()]])
        logits = parts.llm.module(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, said, reduction="none")
        weights = target.weights_NT[row][rollouts.mask_NT[row]] * target.share_N[row]
        assert (weights > 0).all()
        total = total + (weights * losses).sum()
    scale = 2.0 / target.completion_length / target.num_prompts
    (scale * total).backward()
    wanted = gradients(parts.llm)
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_model_card_says_what_pulled_on_the_model() -> None:
    said = {
        ("trainer=sft",): "Nothing but the corpus pulled on it; the constraint was only measured.",
        ("trainer=filtered",): "only measured. Corpus rows that violate the constraint were left",
        ("trainer=rejection",): "trained on completions of its own in proportion to their labels",
        ("trainer=grpo",): "GRPO of TRL trained it towards the constraint",
        (): "the KL to the closest distribution that satisfies the constraint was lowered",
        ("trainer.divergence=jsd", "trainer.filter_corpus=true"): "the Jensen-Shannon divergence",
    }
    for overrides, words in said.items():
        assert words in _aim(compose(list(overrides)).trainer)


@pytest.mark.parametrize("name", ["sft", "filtered", "rejection"])
def test_baselines_compose(name: str) -> None:
    config = compose([f"trainer={name}"])
    assert config.trainer.is_plain == (name != "rejection")
    assert compose([f"trainer={name}", "experiment=smoke"]).trainer.is_plain == (
        name != "rejection"
    )
