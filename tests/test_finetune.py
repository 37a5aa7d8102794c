"""The update: where it comes to rest, what its loss is, and when it refuses to step."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small import (
    LENGTH,
    LETTERS,
    TABLE,
    gradients,
    prompt,
    small_config,
    small_parts,
    tiny_llm,
)
from torch import Tensor
from transformers import get_scheduler

from constrained_ft import finetune, fused
from constrained_ft.compose import compose
from constrained_ft.config import TrainerConfig
from constrained_ft.corpus import corpus_of
from constrained_ft.encoding import Row
from constrained_ft.errors import DivergedError
from constrained_ft.finetune import (
    backward_of_step,
    rows_after_first_step,
    update_llm,
    with_fresh_reference,
)
from constrained_ft.llm import LLM
from constrained_ft.optimization import build_optimization
from constrained_ft.parts import Parts
from constrained_ft.tabular import table_parts
from constrained_ft.target import Target, build_target, learn_target


def row(ids: Sequence[int], trained_from: int, *, prompted: bool) -> Row:
    trained = [i >= trained_from for i in range(len(ids))]
    return Row(token_ids=tuple(ids), trained=tuple(trained), group="rows", prompted=prompted)


def text_rows(*, prompted: bool) -> list[Row]:
    rows = ["a cat sat", "the end of it all", "so it goes", "no"]
    ids = [[*prompt(text).token_ids, 0] for text in rows]
    return [row(i, 2 if prompted else 1, prompted=prompted) for i in ids]


@pytest.fixture(scope="module")
def small() -> tuple[Parts, Target, TrainerConfig]:
    """A tiny model and a target that it is not at."""
    config = small_config("trainer.rollouts_per_step=1000", "trainer.kl_weight=3")
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    # R as if it had learned much: every token's evidence its own.
    noise = torch.randn(target.weights_NT.shape, generator=torch.Generator().manual_seed(1))
    prior_JV = torch.randn(target.table.prior_JV.shape, generator=torch.Generator().manual_seed(2))
    weights_NT = torch.where(target.rollouts.mask_NT, noise.exp(), 0.0)
    table = replace(target.table, prior_JV=3 * prior_JV)
    return parts, replace(target, table=table, weights_NT=weights_NT), config.trainer


def step(
    llm: LLM, target: Target, batches: Sequence[Sequence[Row]], config: TrainerConfig, rows: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and numbers of one step on the first so many rollouts."""
    prompts = float(target.share_N[:rows].sum())
    live = config.reference == "live"
    every = torch.arange(rows)
    numbers = backward_of_step(llm, target, every, [batches], config, prompts, live=live)
    return gradients(llm), numbers


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    scale = max(float(tensor.abs().max()) for tensor in b.values())
    assert scale > 1e-4
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=tolerance * scale, rtol=0)


# Where it comes to rest ---------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["fresh", "live"])
@pytest.mark.parametrize(("kl_weight", "prompted"), [(1.0, True), (4.0, True), (4.0, False)])
def test_satisfaction_at_rest_follows_the_law_of_lambda(
    *, kl_weight: float, prompted: bool, reference: str
) -> None:
    config = compose(
        [
            *TABLE,
            f"trainer.kl_weight={kl_weight}",
            "trainer.iterations=2",
            "trainer.steps_per_iteration=120",
            "trainer.rollouts_per_step=32",
            "trainer.learning_rate=0.1",
            "trainer.per_device_train_batch_size=20",
            f"trainer.reference={reference}",
        ]
    )
    # Of 20 completions of the one prompt, all of two tokens, 11 break the constraint: no c.
    said = [(1, 1)] * 3 + [(2, 1)] * 3 + [(1, 0)] * 3 + [(1, 3)] * 6 + [(3, 0)] * 3 + [(3, 2)] * 2
    rows = [row((0, *tokens), 1, prompted=prompted) for tokens in said]
    parts = table_parts(LETTERS, LENGTH, config, rows)
    for iteration in (1, 2):
        target = learn_target(parts, config, parts.llm.frozen(), iteration)
        update_llm(parts, target, config, iteration)
    probs_HV = torch.softmax(parts.llm.trained_parameters()["table.logits.weight"].detach(), -1)
    first_V, second_VV = probs_HV[0], probs_HV[1:5]
    # Nothing satisfied has a c among its first two tokens; the dot ends it.
    satisfied = first_V[0] + first_V[1] * (1 - second_VV[1, 3]) + first_V[2] * (1 - second_VV[2, 3])
    # Text without prompts counts a mean completion as a sequence: 40 tokens here.
    length = float((parts.replay[0].rollouts.mask_NT.sum(-1)).float().mean())
    weight = kl_weight if prompted else kl_weight * (40 / length) / 20
    assert float(satisfied) == pytest.approx((9 / 20 + weight) / (1 + weight), abs=0.015)


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["fresh", "live"])
@pytest.mark.parametrize("prompted", [True, False])
def test_the_gradient_is_that_of_the_loss_written_out(
    small: tuple[Parts, Target, TrainerConfig], *, prompted: bool, reference: str
) -> None:
    parts, target, config = small
    llm, rows = parts.llm, text_rows(prompted=prompted)
    config = config.model_copy(update={"reference": reference})
    # The LLM has moved away from the reference, and not little.
    noise = torch.randn(
        target.reference.hidden_NTD.shape, generator=torch.Generator().manual_seed(3)
    )
    moved = replace(target.reference, hidden_NTD=target.reference.hidden_NTD + 0.5 * noise)
    target = replace(target, reference=moved)
    ours, numbers = step(llm, target, [rows], config, 12)
    module = llm.module
    ce, tokens = torch.zeros(()), 0
    for one in rows:
        logprobs_LV = module(torch.tensor([one.token_ids])).logits[0].log_softmax(-1)
        for place in range(1, len(one.token_ids)):
            if one.trained[place]:
                ce = ce - logprobs_LV[place - 1, one.token_ids[place]]
                tokens += 1
    lengths = target.rollouts.mask_NT.sum(-1)
    sequences = len(rows) if prompted else tokens / float(lengths.float().mean())
    prompts = [int(target.rollouts.prompt_N[n]) for n in range(12)]
    kl = torch.zeros(())
    for n in range(12):
        x = list(target.rollouts.prompts[prompts[n]].token_ids)
        y = target.rollouts.ids_NT[n, : int(lengths[n])].tolist()
        logprobs_TV = module(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
        for t in range(len(y)):
            log_p_V = target.reference.head(target.reference.hidden_NTD[n, t]).log_softmax(-1)
            if reference == "live":
                log_p_V = logprobs_TV[t].detach()
            u_V = target.table.logits(target.factors_NTJR[n, t], target.offset_NTJ[n, t])
            q_V = (log_p_V.exp() * u_V.sigmoid()).detach()
            q_V = q_V / q_V.sum()
            divergence = (q_V * (q_V.log() - logprobs_TV[t])).sum()
            # Each prompt's mean over its rollouts, each prompt alike.
            kl = kl + target.weights_NT[n, t] * divergence / prompts.count(prompts[n])
    kl = kl / len(set(prompts))
    loss = (ce + config.kl_weight * sequences * kl) / tokens
    loss.backward()
    close(ours, gradients(llm), 1e-4)
    assert numbers["update/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert numbers["update/ce"] == pytest.approx(float(ce.detach()) / tokens, rel=1e-4)


def test_accumulating_two_halves_is_one_batch(
    small: tuple[Parts, Target, TrainerConfig],
) -> None:
    parts, target, config = small
    rows = text_rows(prompted=True)
    whole, numbers = step(parts.llm, target, [rows], config, 12)
    halves, same = step(parts.llm, target, [rows[:2], rows[2:]], config, 12)
    close(halves, whole, 1e-5)
    assert same == pytest.approx(numbers, rel=1e-5)


def test_chunks_of_positions_give_the_dense_gradient(
    small: tuple[Parts, Target, TrainerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, target, config = small
    rows = text_rows(prompted=False)
    monkeypatch.setattr(fused, "chunk_rows_for", lambda *_: 10**6)
    dense, numbers = step(parts.llm, target, [rows], config, 12)
    monkeypatch.setattr(fused, "chunk_rows_for", lambda *_: 7)
    chunked, same = step(parts.llm, target, [rows], config, 12)
    close(chunked, dense, 1e-5)
    assert same == pytest.approx(numbers, rel=1e-5)


def test_padding_and_prompts_get_no_gradient() -> None:
    # Every prefix of a table has weights of its own, so a gradient shows where it came from.
    config = compose([*TABLE, "prompts.prompts_per_iteration=4", "prompts.samples_per_prompt=4"])
    rows = [
        row((0, 1), 1, prompted=True),  # shorter than the next: padded
        row((0, 1, 2, 2), 3, prompted=True),  # `ab` is prompt, the second b is trained
    ]
    parts = table_parts(LETTERS, LENGTH, config, rows)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    nothing = config.trainer.model_copy(update={"kl_weight": 0.0})
    corpus_only, _ = step(parts.llm, target, [rows], nothing, 1)
    touched = corpus_only["table.logits.weight"].abs().sum(-1).nonzero()[:, 0].tolist()
    assert touched == [0, (0 * 4 + 1 + 1) * 4 + 1 + 2]  # the root, and the prefix `ab`
    alone = config.trainer.model_copy(update={"kl_weight": 1.0})
    lengths_N = target.rollouts.mask_NT.sum(-1)
    assert set(lengths_N.tolist()) == {1, 2}
    for n in range(len(lengths_N)):
        backward_of_step(parts.llm, target, torch.tensor([n]), [[]], alone, 1.0)
        got = gradients(parts.llm)["table.logits.weight"].abs().sum(-1).nonzero()[:, 0].tolist()
        prefixes = [0, 1 + int(target.rollouts.ids_NT[n, 0])][: int(lengths_N[n])]
        assert got == [p for p, w in zip(prefixes, target.weights_NT[n], strict=False) if w > 0]


def test_without_the_constraint_it_is_plain_fine_tuning() -> None:
    whole = small_config("trainer.kl_weight=0")
    config = whole.trainer
    rows = text_rows(prompted=True) + text_rows(prompted=False)
    ours, theirs = tiny_llm(), tiny_llm()
    parts = small_parts(small_config())
    target = learn_target(parts, small_config(), parts.llm.frozen(), 1)
    optimization = build_optimization(ours, config)
    corpus = corpus_of(rows)
    parts = replace(parts, llm=ours, optimization=optimization, corpus=corpus, kl_weight=0.0)
    for iteration in (1, 2):
        update_llm(parts, target, whole, iteration)
    # The same, by hand.
    weights = list(theirs.module.parameters())
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, 1, 6)
    for number in range(4):
        batch = corpus.batch(number, config.per_device_train_batch_size, 0)
        longest = max(len(one.token_ids) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, one in enumerate(batch):
            ids[i, : len(one.token_ids)] = torch.tensor(one.token_ids)
            for place, trained in enumerate(one.trained):
                if trained:
                    labels[i, place] = one.token_ids[place]
        optimizer.zero_grad()
        theirs.module(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
    for name, parameter in ours.trained_parameters().items():
        torch.testing.assert_close(
            parameter, theirs.trained_parameters()[name], atol=2e-5, rtol=0, msg=name
        )
        assert not torch.equal(parameter, tiny_llm().trained_parameters()[name])


def test_reading_some_rollouts_leaves_the_expected_gradient_and_what_lambda_means() -> None:
    config = compose([*TABLE, "prompts.prompts_per_iteration=16", "prompts.samples_per_prompt=16"])
    parts = table_parts(LETTERS, LENGTH, config)
    whole = learn_target(parts, config, parts.llm.frozen(), 1)
    assert len(whole.rollouts.texts) == 256
    alone = config.trainer.model_copy(update={"kl_weight": 1.0, "corpus": False})
    rows = [row((0, 1, 2), 1, prompted=False)]

    def gradient(target: Target) -> Tensor:
        every = torch.arange(len(target.rollouts.texts))
        backward_of_step(parts.llm, target, every, [[rows]], alone, float(target.num_prompts))
        return gradients(parts.llm)["table.logits.weight"]

    exact, sums = gradient(whole), torch.zeros(())
    trainer = config.trainer.model_copy(update={"steps_per_iteration": 1, "rollouts_per_step": 64})
    for seed in range(150):
        drawn = config.model_copy(update={"trainer": trainer, "seed": seed})
        some = build_target(
            parts.replay[0], parts.auxiliary.frozen(), whole.reference.head, drawn
        ).with_reference(parts.llm.frozen())
        assert 35 < len(some.rollouts.texts) < 95
        assert some.completion_length == whole.completion_length
        sums = sums + gradient(some)
    torch.testing.assert_close(sums / 150, exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_at_the_target_nothing_moves(small: tuple[Parts, Target, TrainerConfig]) -> None:
    parts, target, config = small
    # R that knows nothing: the target is the LLM itself.
    table = replace(target.table, prior_JV=torch.zeros_like(target.table.prior_JV))
    still = replace(target, table=table, factors_NTJR=torch.zeros_like(target.factors_NTJR))
    still = still.with_reference(parts.llm.frozen())
    got, numbers = step(parts.llm, still, [], config, 12)
    assert numbers["update/kl"] == pytest.approx(0, abs=1e-6)
    assert max(float(tensor.abs().max()) for tensor in got.values()) < 1e-5


def test_before_anything_moved_the_llm_is_its_own_fresh_reference(
    small: tuple[Parts, Target, TrainerConfig],
) -> None:
    parts, target, config = small
    frozen = target.with_reference(parts.llm.frozen())
    kept, numbers = step(parts.llm, frozen, [], config, 12)
    assert numbers["update/kl"] > 1e-4
    live = config.model_copy(update={"reference": "live"})
    found, same = step(parts.llm, target, [], live, 12)
    close(found, kept, 1e-4)
    assert same["update/kl"] == pytest.approx(numbers["update/kl"], rel=1e-4)


def test_rollouts_of_later_steps_get_a_reference_and_those_of_the_first_need_none() -> None:
    config = small_config("trainer.learning_rate=0.05")
    parts = small_parts(config)
    first = learn_target(parts, config, parts.llm.frozen(), 1)
    update_llm(parts, first, config, 1)
    rows_N = rows_after_first_step(first, config, 2)
    assert 0 < len(rows_N) < len(first.rollouts.prompt_N)
    some, every = (first.with_reference(parts.llm.frozen(), rows) for rows in (rows_N, None))
    mask_NT = first.rollouts.mask_NT[rows_N]
    torch.testing.assert_close(
        some.reference.hidden_NTD[rows_N][mask_NT], every.reference.hidden_NTD[rows_N][mask_NT]
    )
    untouched_N = torch.ones(len(first.rollouts.prompt_N), dtype=torch.bool)
    untouched_N[rows_N] = False
    assert torch.equal(
        some.reference.hidden_NTD[untouched_N], first.rollouts.hidden_NTD[untouched_N]
    )
    one = small_config("trainer.steps_per_iteration=1")
    assert len(rows_after_first_step(first, one, 2)) == 0
    assert equal_reference(first.with_reference(parts.llm.frozen(), rows_N[:0]), first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_float32_what_sampling_left_is_the_fresh_reference(precision: str) -> None:
    config = small_config(f"trainer.precision={precision}", "trainer.learning_rate=0.05")
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    before = parts.llm.slots.used
    fresh = with_fresh_reference(parts, target, config, 1)
    read = parts.llm.slots.used > before
    assert read == (precision == "bf16")
    rows_N = rows_after_first_step(target, config, 1)
    passed = target.with_reference(parts.llm.frozen(), rows_N)
    mask_NT = target.rollouts.mask_NT
    gap_NTD = (fresh.reference.hidden_NTD - passed.reference.hidden_NTD)[mask_NT].abs()
    assert gap_NTD.max() < 1e-5
    if precision == "fp32":
        update_llm(parts, target, config, 1)  # the LLM has moved on
        before = parts.llm.slots.used
        with_fresh_reference(parts, target, config, 2)
        assert parts.llm.slots.used > before


def test_without_a_corpus_a_step_still_takes_as_many_passes(
    small: tuple[Parts, Target, TrainerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, target, config = small
    passes = 0
    usual = finetune._losses_of_pass

    def counted(*arguments: object) -> tuple[Tensor, Tensor]:
        nonlocal passes
        passes += 1
        return usual(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune, "_losses_of_pass", counted)
    found, counts = [], []
    for accumulated in (1, 3):
        changes = {"corpus": False, "gradient_accumulation_steps": accumulated}
        own = config.model_copy(update=changes)
        rows_N = torch.arange(12)
        parts.llm.module.zero_grad()
        backward_of_step(parts.llm, target, rows_N, [[]], own, 4.0)
        found.append({n: p.grad for n, p in parts.llm.trained_parameters().items()})
        counts.append(passes)
    assert counts == [1, 4]
    close(found[1], found[0], 1e-5)


def equal_reference(a: Target, b: Target) -> bool:
    return torch.equal(a.reference.hidden_NTD, b.reference.hidden_NTD)


# Guards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "limit", "message"),
    [
        (math.nan, 5.0, "the loss is nan at step 0; lower trainer.learning_rate"),
        (math.inf, 5.0, "the loss is inf at step 0"),
        (1.0, 1e-6, r"nats a token at step 0, above guard.kl_limit=1e-06"),
    ],
)
def test_a_guard_stops_before_anything_moves(weight: float, limit: float, message: str) -> None:
    config = small_config("trainer.kl_weight=1", f"guard.kl_limit={limit}")
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    prior_JV = torch.linspace(-4, 4, target.table.prior_JV.shape[1])[None]
    weights_NT = torch.where(target.rollouts.mask_NT, weight, 0.0)
    table = replace(target.table, prior_JV=prior_JV)
    target = replace(target, table=table, weights_NT=weights_NT)
    before = {name: p.detach().clone() for name, p in parts.llm.trained_parameters().items()}
    with pytest.raises(DivergedError, match=message) as caught:
        update_llm(parts, target, config, 1)
    assert caught.value.exit_code == 4
    for name, parameter in parts.llm.trained_parameters().items():
        assert torch.equal(parameter, before[name])
    assert not parts.optimization.optimizer.state


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(value: float) -> None:
    config = small_config()
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    parameters = parts.llm.trained_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    # The loss stays finite: one gradient alone overflows on its way back.
    next(iter(parameters.values())).register_hook(lambda grad: torch.full_like(grad, value))
    with pytest.raises(DivergedError, match=rf"the gradient's norm is {value} at step 0"):
        update_llm(parts, target, config, 1)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name])
    assert not parts.optimization.optimizer.state
