"""Guided roll-ins: where satisfaction is rare, R learns from beginnings that it guided itself."""

import math

import pytest
import torch
from small import LETTERS, TABLE, small_config, small_parts, tiny_llm
from small import prompt as prompt_of
from torch import Tensor

from constrained_ft.compose import compose
from constrained_ft.decoding import decode
from constrained_ft.errors import ConfigError
from constrained_ft.roll_ins import RollIns
from constrained_ft.rollouts import Rollouts, label
from constrained_ft.selfcheck import _probs, error_of_auxiliary
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import learn_auxiliary, learn_target, states_of

TOKENS = 4
RARE = (
    *(line for line in TABLE if not line.startswith("constraint")),
    "constraint=regex",
    "constraint.scorer.pattern='c.*c.*c'",
    "constraint.scorer.must=contain",
    f"prompts.max_new_tokens={TOKENS}",
    "prompts.samples_per_prompt=32",
    "auxiliary.consistency_weight=0",
    "auxiliary.patience=5",
    "seed=7",
)


def learned(share: float) -> tuple[float, float, float]:
    """P(C), the error of R, its mean R(x); R fitted to the second iteration alone."""
    config = compose([*RARE, f"prompts.guided_roll_ins={share}"])
    parts = table_parts(LETTERS, TOKENS, config)
    every = every_completion(parts.llm, TOKENS)
    labels_Y = label(every, parts.scorers, config.constraint).labels_N.double()
    probs_Y = _probs(parts.llm, every)
    rate = float(probs_Y @ labels_Y)
    for iteration in (1, 2):
        learn_auxiliary(parts, config, parts.llm.frozen(), iteration)
    error = error_of_auxiliary(parts, every, labels_Y)
    first_YT = parts.auxiliary.frozen().satisfaction_of_each(
        Rollouts(**(vars(every) | {"hidden_NTD": states_of(parts.llm.frozen(), every)}))
    )[..., 0]
    return rate, error, float((first_YT[:, 0] * probs_Y).sum())


def test_r_is_fitted_only_where_the_label_is_the_llms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, error, mean = learned(0.5)
    assert 0.003 < rate < 0.03
    assert error < 0.01
    assert mean < 2 * rate
    # Fitted where R guided too, it takes its own guidance for the LLM's doing.
    monkeypatch.setattr(Rollouts, "after_roll_in", property(lambda self: self.mask_NT))
    _, unmasked_error, unmasked_mean = learned(0.5)
    assert unmasked_error > 3 * error
    assert unmasked_mean > 4 * rate


def test_labels_behind_the_roll_in_have_the_mean_that_enumeration_says() -> None:
    llm = table_parts(LETTERS, TOKENS, compose([*RARE])).llm
    frozen, count = llm.frozen(), 20_000
    guided_B = torch.arange(count) % (TOKENS + 1)
    uniforms_BT = torch.rand(count, TOKENS, generator=torch.Generator().manual_seed(0))
    towards_c = torch.tensor([-2.0, 0.0, 0.0, 2.0])
    found = decode(
        frozen,
        [(0,)],
        uniforms_BT.double(),
        guide=lambda hidden_BTD, _: towards_c.expand(len(hidden_BTD), -1),
        guided_B=guided_B,
    )
    every = every_completion(llm, TOKENS)
    probs_Y, c = _probs(llm, every), 3
    last_B = torch.minimum(guided_B, found.mask_BT.sum(-1)) - 1
    for prefix in ((c,), (1,), (c, c), (c, 2)):
        length = len(prefix)
        begins_B = (found.ids_BT[:, :length] == torch.tensor(prefix)).all(-1)
        begins_Y = (every.ids_NT[:, :length] == torch.tensor(prefix)).all(-1)
        exact = float(probs_Y[begins_Y] @ satisfied(every.ids_NT[begins_Y]).double()) / float(
            probs_Y[begins_Y].sum()
        )
        behind_B = begins_B & (last_B <= length - 1)
        said = satisfied(found.ids_BT[behind_B] * found.mask_BT[behind_B]).double()
        spread = math.sqrt(exact * (1 - exact) / len(said))
        assert float(said.mean()) == pytest.approx(exact, abs=4 * spread + 1e-9)
        before = satisfied(found.ids_BT[begins_B & (last_B > length - 1)]).double()
        if exact > 0:
            assert float(before.mean()) > 1.5 * exact


def satisfied(ids_NT: Tensor) -> Tensor:
    return (ids_NT == 3).sum(-1) >= 3


def test_only_the_beginning_is_guided() -> None:
    llm = tiny_llm(sharpness=20.0)
    uniforms_BT = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prompts = [prompt_of("Over there").token_ids]
    always_x = torch.full((len(llm.tokenizer),), -1e4)
    always_x[ord("x")] = 0.0
    calls = []

    def guide(hidden_BTD: Tensor, past_BT: Tensor) -> Tensor:
        calls.append(len(hidden_BTD))
        return torch.nn.functional.pad(
            always_x, (0, llm.head.weight_VD.shape[0] - len(always_x))
        ).expand(len(hidden_BTD), -1)

    plain = decode(llm.frozen(), prompts, uniforms_BT)
    guided_B = torch.tensor([0, 1, 3, 0])
    found = decode(llm.frozen(), prompts, uniforms_BT, guide=guide, guided_B=guided_B)
    assert calls == [2, 1, 1]  # nobody is asked about rows that are not guided
    for row, length in enumerate(guided_B.tolist()):
        assert (found.ids_BT[row, :length] == ord("x")).all()
    for row in (0, 3):
        assert torch.equal(found.ids_BT[row], plain.ids_BT[row])
    # From there on it is what the LLM says after that beginning.
    begun = [(*prompts[0], ord("x"))]
    assert torch.equal(
        found.ids_BT[1, 1:], decode(llm.frozen(), begun, uniforms_BT[1:2, 1:]).ids_BT[0]
    )


def test_a_share_of_each_prompts_completions_is_guided_and_never_all() -> None:
    prompts = [prompt_of(str(i)) for i in range(200)]
    roll_ins = RollIns(guide=lambda hidden, _: hidden, share=0.3)
    lengths_SN = roll_ins.lengths(prompts, 4, 6, seed=0, iteration=2).view(200, 4)
    guided_SN = lengths_SN > 0
    assert float(guided_SN.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert set(guided_SN.sum(-1).tolist()) == {1, 2}
    assert set(lengths_SN.flatten().tolist()) == set(range(7))
    most = RollIns(guide=roll_ins.guide, share=0.99).lengths(prompts, 4, 6, seed=0, iteration=2)
    assert not (most.view(200, 4)[:, 3] > 0).any()
    again = roll_ins.lengths(prompts[50:], 4, 6, seed=0, iteration=2)
    assert torch.equal(again, lengths_SN[50:].flatten())  # a prompt's are its own


def test_rates_and_the_target_are_those_of_unguided_rollouts() -> None:
    config = small_config("prompts.guided_roll_ins=0.5", "prompts.samples_per_prompt=8")
    parts = small_parts(config)
    first = learn_target(parts, config, parts.llm.frozen(), 1)
    assert not (parts.replay[0].rollouts.guided_N > 0).any()  # R had seen nothing
    assert "rollouts/guided_satisfaction" not in first.metrics
    second = learn_target(parts, config, parts.llm.frozen(), 2)
    labeled = parts.replay[0]
    guided_N = labeled.rollouts.guided_N > 0
    assert float(guided_N.float().mean()) == 0.5
    assert not (second.rollouts.guided_N > 0).any()
    assert second.num_prompts == 10
    for name, rows_N in (("satisfaction", ~guided_N), ("guided_satisfaction", guided_N)):
        rate = float(labeled.satisfied_N[rows_N].float().mean())
        assert second.metrics[f"rollouts/{name}"] == pytest.approx(rate)
    lengths_N = labeled.rollouts.mask_NT.sum(-1).float()
    assert second.completion_length == pytest.approx(float(lengths_N[~guided_N].mean()))
    assert second.metrics["auxiliary/examples"] > float((~guided_N).sum())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sampler=hf"], "needs sampler.kind=cft"),
        (["prompts.samples_per_prompt=1"], "one completion of each prompt is never guided"),
        (["trainer=sft"], "from which this trainer learns nothing"),
    ],
)
def test_what_cannot_be_guided_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config("prompts.guided_roll_ins=0.3", *overrides)
