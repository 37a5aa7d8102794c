"""Prompts that are likely to violate the constraint, against what sampling them says."""

from dataclasses import replace

import pytest
import torch
from small import SHAPES, small_config, small_parts

from constrained_ft.mining import prompt_satisfaction, prompts_to_sample
from constrained_ft.target import build_target, learn_target


@pytest.mark.parametrize("shape", SHAPES)
def test_satisfaction_without_a_sample_is_that_of_the_target(shape: str) -> None:
    config = small_config(f"llm.model_name_or_path=tiny:{shape}")
    parts = small_parts(config)
    reference = parts.llm.frozen()
    learn_target(parts, config, reference, 1)
    with torch.no_grad():  # an R with opinions
        for parameter in parts.auxiliary.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    auxiliary = parts.auxiliary.frozen()
    target = build_target(parts.replay[0], auxiliary, reference.head, config)
    prompts = parts.prompts.of_iteration(1, config.prompts.prompts_per_iteration, config.seed)
    found_S = prompt_satisfaction(reference, auxiliary, prompts)
    torch.testing.assert_close(found_S, target.facts.log_satisfied_S, atol=2e-4, rtol=1e-3)
    assert found_S.std() > 0.01  # they differ, so the order means something


def test_the_least_satisfied_candidates_are_sampled() -> None:
    config = small_config("prompts.candidates=3")
    parts = small_parts(config)
    reference = parts.llm.frozen()
    plain = parts.prompts.of_iteration(1, 10, config.seed)
    assert prompts_to_sample(parts, config, reference, 1) == plain
    learn_target(parts, config, reference, 1)
    candidates = parts.prompts.of_iteration(2, 30, config.seed)
    chosen = prompts_to_sample(parts, config, reference, 2)
    left_out = [prompt for prompt in candidates if prompt not in chosen]
    assert len(chosen) == 10
    assert len(left_out) == 20
    auxiliary = parts.auxiliary.frozen()
    lowest = prompt_satisfaction(reference, auxiliary, chosen)
    others = prompt_satisfaction(reference, auxiliary, tuple(left_out))
    assert lowest.max() <= others.min() + 1e-5
    # There may be fewer prompts than candidates are asked for.
    few = replace(parts.prompts, training=parts.prompts.training[:12])
    parts.prompts = few
    assert set(prompts_to_sample(parts, config, reference, 2)) <= set(few.training)
    parts.prompts = replace(few, training=few.training[:10])
    assert len(prompts_to_sample(parts, config, reference, 2)) == 10
