"""Sampling: the distribution, the masks, the hidden states, and what a guide makes of it."""

import signal
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import oracle
import pytest
import torch
from scipy import stats
from small import LENGTH, LETTERS, SHAPES, TABLE, prompt, tiny_llm
from torch import Tensor
from transformers import AutoModelForCausalLM, TopPLogitsWarper

from constrained_ft import equations
from constrained_ft.auxiliary import Auxiliary, FrozenAuxiliary
from constrained_ft.compose import compose
from constrained_ft.config import AuxiliaryConfig, ConstraintConfig, SamplerConfig
from constrained_ft.decoding import Guide, decode, inverse_cdf, truncate
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import Interrupted
from constrained_ft.llm import FrozenLLM
from constrained_ft.loading import load_frozen
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import generator_for
from constrained_ft.resources import resolve_model
from constrained_ft.rollouts import Rollouts, completion_hidden_states, label
from constrained_ft.sampling import sample
from constrained_ft.scorer_config import LettersScorerConfig
from constrained_ft.scorers import build_scorer
from constrained_ft.tabular import table_llm

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
    kind: Literal["cft", "hf"] = "cft",
    top_p: float = 1.0,
) -> Rollouts:
    return sample(
        llm,
        prompts,
        samples_per_prompt=n,
        max_new_tokens=steps,
        sampler=SamplerConfig(kind=kind, batch_size=batch_size),
        seed=0,
        iteration=1,
        display=Silent(),
        stop=StopRequest(),
        guide=guide,
        top_p=top_p,
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


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_generate_as_the_sampler_draws_the_same_distribution(shape: str, *, lora: bool) -> None:
    live = tiny_llm(shape, sharpness=3.0, lora=lora)
    with torch.no_grad():
        for number, parameter in enumerate(live.trained_parameters().values()):
            generator = generator_for(number, "weights")
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    # A checkpoint's own defaults do not count.
    live.module.generation_config.repetition_penalty = 5.0
    frozen = live.frozen()
    count = 3000
    expected = draw(frozen, n=count, steps=2, batch_size=count)
    with torch.no_grad():  # the frozen copy is what is sampled from
        for parameter in live.trained_parameters().values():
            parameter.zero_()
    found = draw(frozen, n=count, steps=2, batch_size=count, kind="hf")
    few, again = (draw(frozen, n=30, steps=2, batch_size=30, kind="hf") for _ in range(2))
    assert torch.equal(few.ids_NT, again.ids_NT)
    assert live.module.generation_config.repetition_penalty == 5.0
    for prompt_index in range(len(PROMPTS)):
        for step in range(2):
            rows = expected.prompt_N == prompt_index
            ours, theirs = (
                torch.where(one.mask_NT, one.ids_NT, 0)[rows, step] for one in (expected, found)
            )
            assert same_distribution(ours, theirs)
    for rollouts in (expected, found):
        rows = torch.arange(0, len(rollouts.texts), 500)
        mask = rollouts.mask_NT[rows]
        again_NTD = completion_hidden_states(frozen, rollouts, rows)
        kept_NTD = rollouts.hidden_NTD[rows]
        torch.testing.assert_close(kept_NTD[mask], again_NTD[mask], atol=1e-5, rtol=1e-4)


def test_generate_ends_where_the_sampler_ends() -> None:
    live = tiny_llm("qwen2", sharpness=4.0)
    frozen = live.frozen()
    usual_D = draw(frozen).hidden_NTD.flatten(0, 1).mean(0)
    with torch.no_grad():  # the end of text comes soon, whatever was said
        live.head.weight_VD[0] = 6.0 * usual_D / usual_D.square().sum()
    found = draw(live.frozen(), n=60, steps=5, kind="hf")
    lengths = found.mask_NT.sum(-1)
    assert lengths.min() < 4
    assert lengths.max() == 5
    for row, length in enumerate(lengths.tolist()):
        ids = found.ids_NT[row].tolist()
        assert found.mask_NT[row].tolist() == [True] * length + [False] * (len(ids) - length)
        assert 0 not in ids[: length - 1]
        assert ids[length - 1] == 0 or length == 5


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("size", [5, 300, 5000])
def test_truncation_keeps_what_transformers_keeps(top_p: float, size: int) -> None:
    logits = torch.randn(8, size, generator=generator_for(size, "logits"), dtype=torch.float64)
    logits = logits * torch.linspace(0.5, 6, 8)[:, None]  # flat to sharp
    warped = TopPLogitsWarper(top_p)(torch.empty(0), logits)
    kept = truncate(logits.softmax(-1), top_p)
    assert torch.equal(kept > 0, warped.isfinite())
    torch.testing.assert_close(kept / kept.sum(-1, keepdim=True), warped.softmax(-1))
    assert truncate(logits, 1.0) is logits


def test_truncated_samples_come_from_the_nucleus() -> None:
    llm = tiny_llm(sharpness=3.0).frozen()
    for kind in ("cft", "hf"):
        rollouts = draw(llm, PROMPTS[:1], n=4000, steps=1, batch_size=4000, kind=kind, top_p=0.6)
        probs_V = llm.head(rollouts.hidden_NTD[0, 0]).softmax(-1)
        nucleus_V = truncate(probs_V[None], 0.6)[0]
        drawn = rollouts.ids_NT[:, 0].bincount(minlength=len(probs_V))
        assert torch.equal(drawn[nucleus_V == 0], torch.zeros_like(drawn[nucleus_V == 0]))
        some = nucleus_V > 0
        expected = (nucleus_V / nucleus_V.sum())[some].double() * 4000
        if some.sum() > 1:
            assert stats.chisquare(drawn[some], expected, sum_check=False).pvalue > SURE


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


def random_auxiliary(llm: FrozenLLM, kind: str) -> FrozenAuxiliary:
    embeddings_VD = llm.head.weight_VD
    config = AuxiliaryConfig(**compose([f"auxiliary={kind}"]).auxiliary.model_dump())
    generator = generator_for(0, "prior")
    prior_V = torch.randn(len(embeddings_VD), generator=generator).clamp(max=0) * 2
    auxiliary = Auxiliary(config, embeddings_VD, prior_V, seed=0)
    with torch.no_grad():
        for parameter in auxiliary.parameters():
            noise = torch.randn(parameter.shape, generator=generator_for(0, "weights"))
            parameter.add_(0.1 * noise)
    return auxiliary.eval().frozen()


def one_that_ends(shape: str) -> FrozenLLM:
    """A tiny model whose completions end after a few tokens."""
    frozen = tiny_llm(shape, sharpness=4.0).frozen()
    bias = torch.zeros(frozen.head.weight_VD.shape[0])
    bias[0] = 6.0  # the end of text, which is the padding too
    bias[257:] = 50.0  # rows beyond the tokenizer, never sampled
    frozen.head = replace(frozen.head, bias_V=bias)
    return frozen


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_ended_are_taken_out_and_the_others_do_not_notice(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, read = one_that_ends(shape), []
    forward = FrozenLLM.read

    def counting(llm: FrozenLLM, ids_BL: Tensor, *others: Any) -> Any:
        read.append(len(ids_BL))
        return forward(llm, ids_BL, *others)

    monkeypatch.setattr(FrozenLLM, "read", counting)
    guided = random_auxiliary(frozen, "additive").guide()
    outcomes = []
    for retire_at in (0.75, 0.0):
        monkeypatch.setattr("constrained_ft.decoding.RETIRE_AT", retire_at)
        for guide in (None, guided):
            read.clear()
            outcomes.append((draw(frozen, n=40, steps=10, guide=guide), read[-1]))
    for (retiring, last), (staying, all_rows) in zip(outcomes[:2], outcomes[2:], strict=True):
        assert last < all_rows / 2
        mask = staying.mask_NT
        assert torch.equal(retiring.mask_NT, mask)
        assert torch.equal(retiring.ids_NT[mask], staying.ids_NT[mask])
        torch.testing.assert_close(
            retiring.hidden_NTD[mask], staying.hidden_NTD[mask], atol=1e-5, rtol=1e-4
        )


def test_rows_end_with_the_end_of_text_and_padding_is_masked() -> None:
    frozen = one_that_ends("qwen2")
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
        assert rollouts.texts[row] == frozen.tokenizer.decode([i for i in ids[:length] if i != 0])


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
        labeled = label(rollouts, [scorer], config)
        broken = torch.tensor(["e" in text.lower() for text in rollouts.texts])
        assert broken.any()
        assert torch.equal(labeled.satisfied_N, ~broken)
        torch.testing.assert_close(labeled.labels_N, torch.where(broken, expected, 1.0))


@pytest.mark.network
@pytest.mark.slow
def test_the_likeliest_tokens_of_the_default_model_are_those_of_generate() -> None:
    config = compose([]).llm.model_copy(update={"lora": None})
    llm = load_frozen(config, precision="fp32")
    texts = ["The weather today", "I", "Once upon a time, in a land far away, there lived a"]
    ids = [llm.tokenizer(text).input_ids for text in texts]
    # A nucleus this small holds one token.
    found = decode(llm, ids, torch.rand(len(ids), 24, dtype=torch.float64), top_p=1e-9)
    module = AutoModelForCausalLM.from_pretrained(
        resolve_model(config.model_name_or_path, config.revision), dtype=torch.float32
    ).eval()
    for row, prompt_ids in enumerate(ids):
        whole = module.generate(
            torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        said = found.ids_BT[row][found.mask_BT[row]].tolist()
        assert said == whole[0, len(prompt_ids) :].tolist()


def test_a_stop_request_is_heard_between_batches() -> None:
    stop = StopRequest()
    stop._receive(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="SIGTERM"):
        sample(
            tiny_llm().frozen(),
            PROMPTS,
            samples_per_prompt=1,
            max_new_tokens=2,
            sampler=SamplerConfig(kind="cft", batch_size=1),
            seed=0,
            iteration=1,
            display=Silent(),
            stop=stop,
        )


# Guided -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["additive", "transformer", "head"])
def test_guided_decoding_draws_from_the_target(kind: str) -> None:
    llm = tiny_llm(sharpness=4.0).frozen()
    frozen = random_auxiliary(llm, kind)
    rollouts = draw(llm, n=3, steps=5, guide=frozen.guide())
    uniforms = {}
    for one in PROMPTS:
        generator = generator_for(0, "rollouts", 1, one.id)
        uniforms[one.text] = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    evidence = frozen.read(rollouts)
    u_NTV = frozen.table.logits(evidence.factors_NTJR, evidence.offset_NTJ)
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


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.5])
def test_guidance_of_any_strength_draws_from_p_times_r_to_that_power(strength: float) -> None:
    size, count = len(LETTERS), 20_000
    llm = table_llm(LETTERS, LENGTH, compose(TABLE).llm, seed=3).frozen()
    auxiliary = random_auxiliary(llm, "additive")
    # Milder: at its full size nothing but one token is left.
    auxiliary.table = replace(auxiliary.table, tokens_JVR=auxiliary.table.tokens_JVR / 40)
    # Every completion, p and R of every token after every prefix of it; the rest is numpy.
    ids_NT = torch.from_numpy(oracle.completions(size, LENGTH))
    lengths_N = torch.full((len(ids_NT),), LENGTH + 1)
    hidden_NTD = llm.hidden_states(torch.nn.functional.pad(ids_NT, (1, 0)), lengths_N)[:, :-1]
    read = auxiliary.read_examples(hidden_NTD, ids_NT, torch.ones_like(ids_NT, dtype=torch.bool))
    u_NTV = auxiliary.table.logits(read.factors_NTJR, read.offset_NTJ).double().numpy()
    p_NTV = llm.head(hidden_NTD).double().softmax(-1).numpy()
    q_NTV = p_NTV * (1 / (1 + np.exp(-u_NTV))) ** strength
    tables = [np.log(q_NTV[:: size ** (LENGTH - t), t]) for t in range(LENGTH)]
    expected = oracle.completion_probs(oracle.softmax(oracle.stopping(tables, stop=0)))

    one = Prompt(id="one", text="one", group="prompts", token_ids=(0,))
    guide = auxiliary.guide(strength)
    rollouts = draw(llm, [one], n=count, steps=LENGTH, batch_size=count, guide=guide)
    said_NT = torch.where(rollouts.mask_NT, rollouts.ids_NT, 0).numpy()
    observed = np.bincount(said_NT @ size ** np.arange(LENGTH)[::-1], minlength=size**LENGTH)
    some = expected * count > 5
    assert some.sum() > 15
    observed = np.append(observed[some], observed[~some].sum())
    expected = np.append(expected[some], expected[~some].sum()) * count
    assert stats.chisquare(observed, expected).pvalue > SURE
