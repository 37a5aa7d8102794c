"""`prompts.scored_share`: some completions are scored, the update reads all."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import go_on, run, small_config, small_parts, stopped
from test_schedules import equal

from constrained_ft import metrics
from constrained_ft.config import Config
from constrained_ft.distributed import unpack
from constrained_ft.errors import ConfigError
from constrained_ft.parts import Parts
from constrained_ft.placement import _packed, _target_from
from constrained_ft.rollouts import Rollouts
from constrained_ft.scoring import to_be_scored
from constrained_ft.target import build_target, learn_target

SHARE = "prompts.scored_share=0.3"  # 12 of 40


def learned(*overrides: str) -> tuple[Config, Parts]:
    config = small_config(*overrides)
    parts = small_parts(config)
    learn_target(parts, config, parts.llm.frozen(), 1)
    return config, parts


def test_so_many_are_scored_and_of_every_prompt() -> None:
    _, parts = learned(SHARE)
    labeled = parts.replay[0]
    assert labeled.unscored is not None
    assert len(labeled.rollouts.texts) == 12
    assert len(labeled.unscored.texts) == 28
    asked = Counter(labeled.rollouts.prompt_texts)
    assert sorted(asked.values()) == [1] * 8 + [2] * 2
    # All that is sampled is as without a share: the first ones of each prompt are scored.
    _, whole = learned()
    both = Counter(zip(labeled.said.prompt_texts, labeled.said.texts, strict=True))
    every = whole.replay[0].rollouts
    assert both == Counter(zip(every.prompt_texts, every.texts, strict=True))
    place: Counter[str] = Counter()
    first = []
    for prompt, text in zip(every.prompt_texts, every.texts, strict=True):
        place[prompt] += 1
        if place[prompt] <= asked[prompt]:
            first.append((prompt, text))
    assert first == list(zip(labeled.rollouts.prompt_texts, labeled.rollouts.texts, strict=True))


def test_any_batch_says_the_same_and_what_r_guided_is_scored() -> None:
    config, parts = learned()
    every = parts.replay[0].rollouts
    guided_N = (torch.arange(40) % 4 < 1).long()
    for rollouts, count in ((every, 12), (replace(every, guided_N=guided_N), 12 + 10)):
        prompts = small_config(SHARE).prompts
        whole_N = to_be_scored(rollouts, every.prompts, prompts, config.seed)
        assert int(whole_N.sum()) == count
        assert bool(whole_N[rollouts.guided_N > 0].all())
        for start in range(0, 10, 3):
            some = rollouts.prompts[start : start + 3]
            rows = torch.arange(4 * start, 4 * (start + len(some)))
            part = replace(rollouts.take(rows), prompts=some)
            part = replace(part, prompt_N=part.prompt_N - start)
            said_N = to_be_scored(part, every.prompts, prompts, config.seed)
            assert torch.equal(said_N, whole_N[rows])
    least = small_config("prompts.scored_share=0.001").prompts
    assert int(to_be_scored(every, every.prompts, least, config.seed).sum()) == 1


def test_the_target_does_not_depend_on_what_was_scored() -> None:
    """With the same R, q* and its prefixes are those of all completions."""
    config, parts = learned(SHARE)
    _, whole = learned()
    with torch.no_grad():  # an R with opinions
        for parameter in parts.auxiliary.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    head = parts.llm.frozen().head
    auxiliary = parts.auxiliary.frozen()
    some = build_target(parts.replay[0], auxiliary, head, config)
    every = build_target(whole.replay[0], auxiliary, head, config)
    assert some.num_prompts == every.num_prompts == 10
    assert every.facts.kl_N.std() > 0
    assert some.metrics == pytest.approx(every.metrics, rel=1e-5)
    assert same_rows(some.rollouts, some.weights_NT, every.rollouts, every.weights_NT)
    torch.testing.assert_close(some.facts.log_satisfied_S, every.facts.log_satisfied_S)


def same_rows(a: Rollouts, weights_a: torch.Tensor, b: Rollouts, weights_b: torch.Tensor) -> bool:
    def rows(of: Rollouts, weights: torch.Tensor) -> list[tuple[str, str, list[float]]]:
        rounded = [[round(w, 4) for w in row] for row in weights.tolist()]
        return sorted(zip(of.prompt_texts, of.texts, rounded, strict=True))

    return rows(a, weights_a) == rows(b, weights_b)


def test_a_run_pays_for_what_it_scores_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = small_config(SHARE, "trainer=overlapped")
    whole = run(config, tmp_path / "whole")
    rows = metrics.read(whole.metrics_file)
    assert [row["rollouts/scored"] for row in rows[:2]] == [12.0, 12.0]
    lines = whole.rollouts_file(1).read_text().splitlines()
    assert len(lines) == 12
    assert all(json.loads(line)["score"] is not None for line in lines)
    stopped(config, tmp_path / "broken", after=2)
    go_on(config, tmp_path / "broken")
    for file in ("model.safetensors", "auxiliary.safetensors"):
        (ours,) = (tmp_path / "broken" / "final").rglob(file)
        (theirs,) = (tmp_path / "whole" / "final").rglob(file)
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_was_not_scored_travels_and_is_not_replayed() -> None:
    config, parts = learned(SHARE)
    head = parts.llm.frozen().head
    target = build_target(parts.replay[0], parts.auxiliary.frozen(), head, config)
    tensors, facts = unpack(_packed(target, parts, config, {}))
    assert isinstance(facts, dict)
    other = small_parts(config)
    assert equal(_target_from(tensors, facts, other, config, head), target)
    learn_target(parts, config, parts.llm.frozen(), 2)
    assert parts.replay[0].unscored is not None
    assert parts.replay[1].unscored is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer=rejection"], "trainer.divergence=accepted learns from the label of each"),
        (["trainer.prefixes=accepted"], "trainer.prefixes=accepted learns from the label of each"),
        (["trainer=grpo"], "trainer.trl learns from the label of each"),
    ],
)
def test_what_needs_every_label_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(SHARE, *overrides)
