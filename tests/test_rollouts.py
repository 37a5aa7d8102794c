"""Sampling: the distribution, the masks, the hidden states, and what a guide makes of it."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from small import SHAPES, prompt, tiny_llm
from torch import Tensor

from constrained_ft import equations
from constrained_ft.auxiliary import Auxiliary
from constrained_ft.compose import compose
from constrained_ft.config import AuxiliaryConfig, ConstraintConfig, LettersScorerConfig
from constrained_ft.distributed import StopRequest, generator_for
from constrained_ft.errors import Interrupted
from constrained_ft.llm import FrozenLLM
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.rollouts import (
    Guide,
    Rollouts,
    completion_hidden_states,
    inverse_cdf,
    label,
    sample,
)
from constrained_ft.scorers import build_scorer

PROMPTS = [prompt(text) for text in ("the cat sat", "a", "on and on it went, until")]
SURE = 1e-4  # chance that a right sampler fails a test


def draw(
    llm: FrozenLLM,
    prompts: list[Prompt] = PROMPTS,
    *,
    n: int = 4,
    steps: int = 6,
    batch_size: int = 64,
    guide: Guide | None = None,
) -> Rollouts:
    return sample(
        llm,
        prompts,
        samples_per_prompt=n,
        max_new_tokens=steps,
        batch_size=batch_size,
        seed=0,
        iteration=1,
        display=Silent(),
        stop=StopRequest(),
        guide=guide,
    )


def as_lists(rollouts: Rollouts) -> dict[str, list[list[int]]]:
    """The completions of each prompt."""
    said: dict[str, list[list[int]]] = {}
    for row, index in enumerate(rollouts.prompt_N.tolist()):
        tokens = rollouts.ids_NT[row][rollouts.mask_NT[row]].tolist()
        said.setdefault(rollouts.prompts[index].text, []).append(tokens)
    return said


# One draw -----------------------------------------------------------------------------------------


def test_draws_have_the_probabilities_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    probs_V = torch.rand(700, generator=generator) ** 3
    probs_V[::3] = 0
    probs_V[256:512] = 0  # a whole block
    probs_V = probs_V / probs_V.sum()
    uniforms_B = torch.rand(40_000, generator=generator, dtype=torch.float64)
    drawn_B = inverse_cdf(probs_V.expand(len(uniforms_B), -1), uniforms_B)
    counts = np.bincount(drawn_B.numpy(), minlength=700)
    assert counts[probs_V.numpy() == 0].sum() == 0
    some = probs_V.numpy() * len(uniforms_B) > 5
    observed = np.append(counts[some], counts[~some].sum())
    expected = np.append(probs_V[some], probs_V[~some].sum()).astype(np.float64)
    expected *= observed.sum() / expected.sum()
    assert stats.chisquare(observed, expected).pvalue > SURE


@pytest.mark.parametrize("size", [1, 3, 256, 257, 600])
def test_the_ends_of_the_unit_interval_draw_what_is_possible(size: int) -> None:
    for possible in ([0], [size - 1], [size // 2], [0, size - 1]):
        probs_BV = torch.zeros(3, size)
        probs_BV[:, possible] = 1 / len(set(possible))
        ends_B = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)
        drawn = inverse_cdf(probs_BV, ends_B).tolist()
        assert drawn == [min(possible), max(possible), max(possible)]


def test_the_inverse_cdf_is_the_inverse_of_the_cdf() -> None:
    probs_V = torch.tensor([0.2, 0.0, 0.5, 0.3])
    uniforms_B = torch.tensor([0.0, 0.1, 0.21, 0.69, 0.71, 0.999], dtype=torch.float64)
    assert inverse_cdf(probs_V.expand(6, -1), uniforms_B).tolist() == [0, 0, 2, 2, 3, 3]


# The sampler --------------------------------------------------------------------------------------


def same_distribution(a: Tensor, b: Tensor) -> bool:
    """A chi-square test of two samples; rare outcomes are taken together."""
    counts = np.array([np.bincount(sample.numpy(), minlength=300) for sample in (a, b)])
    common = counts.sum(0) > 20
    kept = np.concatenate([counts[:, common], counts[:, ~common].sum(1, keepdims=True)], 1)
    kept = kept[:, kept.sum(0) > 0]
    assert kept.shape[1] > 10
    return bool(stats.chi2_contingency(kept).pvalue > SURE)


def test_the_chi_square_test_tells_a_temperature() -> None:
    llm = tiny_llm(sharpness=3.0).frozen()
    first = draw(llm, PROMPTS[:1], n=6000, steps=1, batch_size=6000).ids_NT[:, 0]
    llm.head = replace(llm.head, weight_VD=llm.head.weight_VD * 1.3)
    cooler = draw(llm, PROMPTS[:1], n=6000, steps=1, batch_size=6000).ids_NT[:, 0]
    assert not same_distribution(first, cooler)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sampler_draws_what_generate_draws(shape: str) -> None:
    llm, count = tiny_llm(shape, sharpness=3.0), 6000
    first_two = []
    for one in PROMPTS[:2]:
        rollouts = draw(llm.frozen(), [one], n=count, steps=2, batch_size=count)
        ours = torch.where(rollouts.mask_NT, rollouts.ids_NT, 0)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            theirs = llm.module.generate(
                torch.tensor([one.token_ids]),
                attention_mask=torch.ones(1, len(one.token_ids), dtype=torch.long),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=count,
                max_new_tokens=2,
                pad_token_id=0,
                eos_token_id=0,
                suppress_tokens=list(range(257, llm.module.config.vocab_size)) or None,
            )[:, len(one.token_ids) :]
        first_two.append((ours, theirs))
    for ours, theirs in first_two:
        tables = []
        for tokens in (ours, theirs):
            # Seven classes of each token: pairs are too many.
            cells = (tokens[:, 0] % 7) * 7 + tokens[:, 1] % 7
            tables.append((cells, tokens[:, 0]))
        for mine, others in zip(*tables, strict=True):
            assert same_distribution(mine, others)


def test_samples_do_not_depend_on_batches_or_on_the_order_of_prompts() -> None:
    llm = tiny_llm(sharpness=2.0).frozen()
    expected = as_lists(draw(llm))
    assert len({tuple(tokens) for tokens in expected[PROMPTS[0].text]}) == 4
    for batch_size in (1, 4, 8, 1000):
        assert as_lists(draw(llm, batch_size=batch_size)) == expected
    assert as_lists(draw(llm, PROMPTS[::-1])) == expected
    assert as_lists(draw(llm, PROMPTS[1:2])) == {"a": expected["a"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_states_that_decoding_keeps_are_those_of_a_forward_pass(shape: str) -> None:
    llm = tiny_llm(shape, sharpness=4.0).frozen()
    rollouts = draw(llm)
    rows = torch.arange(len(rollouts.texts))
    again = completion_hidden_states(llm, rollouts, rows)
    mask = rollouts.mask_NT
    torch.testing.assert_close(rollouts.hidden_NTD[mask], again[mask], atol=1e-5, rtol=1e-4)
    for row in (0, 5, 10):
        said = rollouts.ids_NT[row][mask[row]].tolist()
        ids = list(rollouts.prompts[int(rollouts.prompt_N[row])].token_ids) + said
        alone = llm.hidden_states(torch.tensor([ids]), torch.tensor([len(ids)]))
        expected = alone[0, len(ids) - len(said) - 1 : -1]
        kept = rollouts.hidden_NTD[row, : len(said)]
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-4)


def test_rows_end_with_the_end_of_text_and_padding_is_masked() -> None:
    llm = tiny_llm("qwen2", sharpness=4.0)
    with torch.no_grad():
        bias = torch.zeros(llm.head.weight_VD.shape[0])
        bias[0] = 6.0  # the end of text, which is the padding too
        bias[257:] = 50.0  # rows beyond the tokenizer, never sampled
    frozen = llm.frozen()
    frozen.head = replace(frozen.head, bias_V=bias)
    rollouts = draw(frozen, n=40, steps=10)
    lengths = rollouts.mask_NT.sum(-1)
    assert lengths.min() == 1
    assert lengths.max() > 3
    for row, length in enumerate(lengths.tolist()):
        ids, mask = rollouts.ids_NT[row].tolist(), rollouts.mask_NT[row].tolist()
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert 0 not in ids[: length - 1]
        assert ids[length - 1] == 0 or length == 10
        assert max(ids[:length]) < 257
        assert rollouts.texts[row] == llm.tokenizer.decode([i for i in ids[:length] if i != 0])


def test_verdicts_follow_the_constraint() -> None:
    rollouts = draw(tiny_llm(sharpness=4.0).frozen(), n=40, steps=10)
    scorer = build_scorer(LettersScorerConfig(kind="letters", letter="e", at_most=0))
    constraint = {"satisfied_at": 0.5, "threshold": 1.0, "beta": 2.0}
    for labels, expected in [("hard", 0.0), ("soft", 0.0), ("tilt", float(np.exp(-2.0)))]:
        config = ConstraintConfig(
            scorer=LettersScorerConfig(kind="letters", letter="e", at_most=0),
            labels=labels,
            **constraint,
        )
        labeled = label(rollouts, scorer, config)
        broken = torch.tensor(["e" in text.lower() for text in rollouts.texts])
        assert broken.any()
        assert torch.equal(labeled.satisfied_N, ~broken)
        torch.testing.assert_close(labeled.labels_N, torch.where(broken, expected, 1.0))


def test_a_stop_request_is_heard_between_batches() -> None:
    stop = StopRequest()
    stop._receive(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="SIGTERM"):
        sample(
            tiny_llm().frozen(),
            PROMPTS,
            samples_per_prompt=1,
            max_new_tokens=2,
            batch_size=1,
            seed=0,
            iteration=1,
            display=Silent(),
            stop=stop,
        )


# Guided -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["additive", "transformer", "head"])
def test_guided_decoding_draws_from_the_target(kind: str) -> None:
    llm = tiny_llm(sharpness=4.0).frozen()
    embeddings_VD = llm.head.weight_VD
    config = AuxiliaryConfig(**compose([f"auxiliary={kind}"]).auxiliary.model_dump())
    prior_V = torch.randn(257, generator=generator_for(0, "prior")).clamp(max=0) * 2
    auxiliary = Auxiliary(config, embeddings_VD, prior_V, seed=0)
    with torch.no_grad():
        for parameter in auxiliary.parameters():
            noise = torch.randn(parameter.shape, generator=generator_for(0, "weights"))
            parameter.add_(0.1 * noise)
    auxiliary.eval()
    frozen = auxiliary.frozen()
    rollouts = draw(llm, n=3, steps=5, guide=frozen.guide())
    uniforms = {}
    for one in PROMPTS:
        generator = generator_for(0, "rollouts", 1, one.id)
        uniforms[one.text] = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    evidence = frozen.read(rollouts)
    u_NTV = frozen.table.logits(evidence.factors_NTR, evidence.offset_NT)
    log_q_NTV = equations.target_logprobs(llm.head(rollouts.hidden_NTD), u_NTV)
    differs = 0
    for row in range(len(rollouts.texts)):
        uniform_T = uniforms[rollouts.prompts[int(rollouts.prompt_N[row])].text][row % 3]
        length = int(rollouts.mask_NT[row].sum())
        for t in range(length):
            cumulative_V = log_q_NTV[row, t].double().exp().cumsum(-1)
            token = int(rollouts.ids_NT[row, t])
            low = float(cumulative_V[token - 1]) if token else 0.0
            assert low - 1e-5 <= float(uniform_T[t]) <= float(cumulative_V[token]) + 1e-5
            log_p_V = llm.head(rollouts.hidden_NTD[row, t]).log_softmax(-1)
            differs += int((log_p_V - log_q_NTV[row, t]).abs().max() > 0.1)
    assert differs > 10


def test_one_prompt_has_one_state_for_its_first_token() -> None:
    rollouts = draw(tiny_llm().frozen())
    for index in range(len(PROMPTS)):
        first: Tensor = rollouts.hidden_NTD[rollouts.prompt_N == index, 0]
        assert torch.equal(first, first[:1].expand_as(first))
