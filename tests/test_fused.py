"""The fused loss against the readable equations in float64, which share no code with it."""

import inspect
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from constrained_ft import equations
from constrained_ft import fused as fused_module
from constrained_ft.fused import (
    Head,
    Labels,
    Losses,
    Tilt,
    chunk_rows_for,
    expected_satisfaction,
    fused_losses,
)

SHAPES = 1000
READ = ("hidden_MD", "factors_MJR", "offset_MJ", "tokens_JVR", "prior_JV")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows with a target, labels, or both."""

    hidden: Tensor
    head: Head
    tilt: Tilt | None
    labels: Labels | None

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another precision."""

        def convert(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        def head(head: Head) -> Head:
            return replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=convert(head.bias_V))

        tilt, labels = self.tilt, self.labels
        if tilt is not None:
            floating = (*READ, "floor_M")
            parts = {name: convert(getattr(tilt, name)) for name in (*floating, "weights_M")}
            tilt = replace(tilt, head=head(tilt.head), **parts)  # type: ignore[arg-type]
        if labels is not None:
            labels = replace(labels, weights_M=labels.weights_M.to(dtype))
        return Case(hidden=self.hidden.to(dtype), head=head(self.head), tilt=tilt, labels=labels)


def some_case(seed: int) -> Case:
    """Any size, any head, any mixture of losses, masked rows, floors and sharp distributions."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def chance(probability: float) -> bool:
        return float(torch.rand((), generator=g)) < probability

    rows, width, size, rank = number(1, 40), number(1, 24), number(2, 90), number(1, 8)
    terms = number(1, 3)
    sharpness = 10 ** float(torch.rand((), generator=g) * 1.5 - 0.5)

    def head() -> Head:
        bias = normal(size) if chance(0.4) else None
        weight = sharpness * normal(size, width) / math.sqrt(width)
        return Head(weight_VD=weight, bias_V=bias, bf16_valued=False)

    def weights() -> Tensor:
        # Some rows are masked.
        return torch.rand(rows, generator=g).double() * (torch.rand(rows, generator=g) > 0.3)

    kind = number(0, 3)  # 0: cross-entropy alone, 1: KL alone, others: both on the same rows
    own = head()
    hidden = normal(rows, width)
    tilt = labels = None
    if kind > 0:
        reference = own if chance(0.5) else head()
        tilt = Tilt(
            hidden_MD=hidden + 0.3 * normal(rows, width),
            head=reference,
            factors_MJR=normal(rows, terms, rank),
            offset_MJ=2 * normal(rows, terms),
            tokens_JVR=2 * normal(terms, size, rank),
            prior_JV=normal(terms, size),
            limit=15.0,
            floor_M=torch.rand(rows, generator=g).double() if chance(0.3) else None,
            weights_M=4 * weights(),
        )
    if kind != 1:
        next_M = torch.randint(size, (rows,), generator=g)
        labels = Labels(next_M=next_M, weights_M=weights())
    # What float32 can say, so that both precisions are asked the same question.
    return Case(hidden=hidden, head=own, tilt=tilt, labels=labels).to(torch.float32)


def logits_of_r(tilt: Tilt) -> Tensor:
    """By the equations, over the whole vocabulary."""
    return equations.auxiliary_logits(
        tilt.factors_MJR, tilt.offset_MJ, tilt.tokens_JVR, tilt.prior_JV, tilt.limit
    )


def dense(case: Case) -> tuple[Losses, list[Tensor | None]]:
    """By the equations, and autograd through all logits at once."""
    found, (hidden, weight, bias_MV) = by_row(case)
    return found, [hidden, weight, None if bias_MV is None else bias_MV.sum(0)]


def by_row(case: Case) -> tuple[Losses, list[Tensor | None]]:
    """The same, with the part of each row in the gradient of the bias, [M, V]."""
    case = case.to(torch.float64)
    bias = case.head.bias_V
    bias_MV = None if bias is None else bias.expand(len(case.hidden), -1)
    leaves = [case.hidden, case.head.weight_VD, bias_MV]
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    hidden, weight, bias_MV = leaves
    assert hidden is not None
    assert weight is not None
    logits = hidden @ weight.T
    logits = logits if bias_MV is None else logits + bias_MV
    total = logits.sum() * 0
    kl = ce = log_satisfaction = None
    if case.tilt is not None:
        tilt = case.tilt
        theirs = torch.nn.functional.linear(tilt.hidden_MD, tilt.head.weight_VD, tilt.head.bias_V)
        u = logits_of_r(tilt)
        floor = 0.0 if tilt.floor_M is None else tilt.floor_M
        kl = equations.kl_to_target(equations.target_logprobs(theirs, u, floor), logits)
        satisfied, _ = equations.expected_satisfaction_logprobs(theirs, u)
        log_satisfaction = equations.floored_logprob(satisfied, floor)
        total = total + (kl * tilt.weights_M).sum()
    if case.labels is not None:
        ce = torch.nn.functional.cross_entropy(logits, case.labels.next_M, reduction="none")
        total = total + (ce * case.labels.weights_M).sum()
    total.backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    found = Losses(
        loss=total.detach(),
        kl_M=None if kl is None else kl.detach(),
        ce_M=None if ce is None else ce.detach(),
        log_satisfaction_M=log_satisfaction,
    )
    return found, gradients


def fused(
    case: Case, *, chunk_rows: int | None = None, trained: bool = True
) -> tuple[Losses, list[Tensor | None]]:
    """By the fused pass."""
    leaves = [case.hidden, case.head.weight_VD, case.head.bias_V]
    wanted = [True, trained, trained]
    leaves = [
        None if leaf is None else leaf.clone().requires_grad_(wants)
        for leaf, wants in zip(leaves, wanted, strict=True)
    ]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    head = replace(case.head, weight_VD=weight, bias_V=bias)
    found = fused_losses(hidden, head, tilt=case.tilt, labels=case.labels, chunk_rows=chunk_rows)
    found.loss.backward()  # type: ignore[no-untyped-call]
    found = replace(found, loss=found.loss.detach())
    return found, [None if leaf is None else leaf.grad for leaf in leaves]


def apart(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The largest difference, beside the largest number."""
    if ours is None or theirs is None:
        assert ours is None
        assert theirs is None
        return 0.0
    scale = theirs.abs().max().clamp_min(1e-3)
    return float((ours.double() - theirs).abs().max() / scale)


def off(ours: Tensor, theirs: Tensor) -> float:
    """How far a loss is off, in nats, beside what is above one nat."""
    return float((ours.double() - theirs).abs() / theirs.abs().clamp_min(1.0))


def test_a_thousand_shapes_have_the_losses_and_gradients_of_the_equations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {"kl": 0, "ce": 0, "floor": 0, "bias": 0, "one": 0, "two": 0, "three": 0}
    for seed in range(SHAPES):
        case = some_case(seed)
        theirs, [*their_gradients, bias_MV] = by_row(case)
        their_gradients.append(None if bias_MV is None else bias_MV.sum(0))
        chunk_rows = 1 + seed % 41
        monkeypatch.setattr(fused_module, "_EVIDENCE_ROWS", {"cpu": 1 + seed % 13})
        monkeypatch.setattr(fused_module, "_TILE_BYTES", 400 * (1 + seed % 7))
        ours, our_gradients = fused(case, chunk_rows=chunk_rows)
        if theirs.kl_M is not None:
            assert ours.kl_M is not None
            assert ours.log_satisfaction_M is not None
            assert theirs.log_satisfaction_M is not None
            assert float((ours.kl_M - theirs.kl_M).abs().max()) < 5e-6 * max(
                1.0, float(theirs.kl_M.max())
            ), seed
            assert float(ours.kl_M.min()) >= 0, seed
            gap = ours.log_satisfaction_M - theirs.log_satisfaction_M
            assert float(gap.abs().max()) < 2e-5, seed
        if theirs.ce_M is not None:
            assert apart(ours.ce_M, theirs.ce_M) < 1e-5, seed
        assert off(ours.loss, theirs.loss) < 5e-6, seed
        for mine, exact in zip(our_gradients, their_gradients, strict=True):
            assert apart(mine, exact) < 1e-4, seed
        # Nothing depends on where the rows are cut, but the rounding of products.
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
            same = case.to(dtype)
            cut, cut_gradients = fused(same, chunk_rows=chunk_rows)
            whole, whole_gradients = fused(same, chunk_rows=1000)
            assert off(cut.loss, whole.loss.double()) < tolerance, seed
            for mine, uncut in zip(cut_gradients[:2], whole_gradients[:2], strict=True):
                gradient = None if uncut is None else uncut.double()
                assert apart(mine, gradient) < tolerance, seed
            assert (cut_gradients[2] is None) == (whole_gradients[2] is None) == (bias_MV is None)
            if bias_MV is not None:
                # Its rows cancel, what they are rounded by does not: so beside their sizes.
                sizes = float(bias_MV.abs().sum(0).max().clamp_min(1e-3))
                gap = float((cut_gradients[2] - whole_gradients[2]).abs().max())
                assert gap < 16 * torch.finfo(dtype).eps * sizes, seed
        seen["kl"] += theirs.kl_M is not None
        seen["ce"] += theirs.ce_M is not None
        seen["floor"] += case.tilt is not None and case.tilt.floor_M is not None
        seen["bias"] += case.head.bias_V is not None
        if case.tilt is not None:
            seen[("one", "two", "three")[len(case.tilt.prior_JV) - 1]] += 1
    assert min(seen.values()) > SHAPES / 10


def with_both(seed: int) -> Case:
    return next(
        case for case in map(some_case, range(seed, 2 * SHAPES)) if case.tilt and case.labels
    )


@pytest.mark.parametrize("seed", range(20))
def test_bfloat16_hidden_states_have_float32_losses(seed: int) -> None:
    case = with_both(seed)
    rounded = replace(case, hidden=case.hidden.bfloat16())
    theirs, their_gradients = dense(replace(case, hidden=rounded.hidden.float()))
    ours, our_gradients = fused(rounded)
    assert ours.kl_M is not None
    assert ours.kl_M.dtype == torch.float32
    assert off(ours.loss, theirs.loss) < 5e-6
    assert our_gradients[0] is not None
    assert our_gradients[0].dtype == torch.bfloat16
    assert apart(our_gradients[0], their_gradients[0]) < 1e-2


@pytest.mark.parametrize("seed", range(20))
def test_heads_of_bfloat16_numbers_lose_nothing_but_in_the_gradient(seed: int) -> None:
    case = with_both(seed)
    assert case.tilt is not None

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.bfloat16().float()

    def head(one: Head) -> Head:
        return replace(one, weight_VD=rounded(one.weight_VD), bf16_valued=True)

    tilt = replace(case.tilt, hidden_MD=rounded(case.tilt.hidden_MD), head=head(case.tilt.head))
    case = replace(case, hidden=rounded(case.hidden), head=head(case.head), tilt=tilt)
    theirs, their_gradients = dense(case)
    ours, our_gradients = fused(case, trained=False)
    assert ours.kl_M is not None
    assert theirs.kl_M is not None
    assert float((ours.kl_M - theirs.kl_M).abs().max()) < 5e-6 * max(1.0, float(theirs.kl_M.max()))
    assert off(ours.loss, theirs.loss) < 5e-6
    assert apart(our_gradients[0], their_gradients[0]) < 1e-2


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    case = with_both(0)
    frozen, gradients = fused(case, trained=False)
    trained, wanted = fused(case)
    assert gradients[1:] == [None, None]
    assert torch.equal(gradients[0], wanted[0])  # type: ignore[arg-type]
    assert torch.equal(frozen.loss, trained.loss)


def test_a_row_of_weight_nothing_is_not_there() -> None:
    case = with_both(3)
    assert case.tilt is not None
    assert case.labels is not None
    kept = torch.arange(len(case.hidden)) % 2 == 0
    masked = replace(
        case,
        tilt=replace(case.tilt, weights_M=case.tilt.weights_M * kept),
        labels=replace(case.labels, weights_M=case.labels.weights_M * kept),
    )
    loss, gradients = fused(masked)
    expected, _ = dense(masked)
    assert off(loss.loss, expected.loss) < 5e-6
    assert gradients[0] is not None
    assert float(gradients[0][~kept].abs().max()) == 0


def test_the_target_and_the_reference_get_no_gradient() -> None:
    case = with_both(5)
    assert case.tilt is not None
    watched = {name: getattr(case.tilt, name).clone().requires_grad_() for name in READ}
    loss, _ = fused(replace(case, tilt=replace(case.tilt, **watched)))
    assert all(tensor.grad is None for tensor in watched.values())
    assert loss.kl_M is not None
    assert not loss.kl_M.requires_grad


def test_what_the_reference_excludes_stays_excluded() -> None:
    case = next(c for c in map(some_case, range(SHAPES)) if c.tilt and len(c.head.weight_VD) > 5)
    assert case.tilt is not None
    bias = torch.zeros(len(case.head.weight_VD))
    bias[::2] = -math.inf
    tilt = replace(case.tilt, head=replace(case.tilt.head, bias_V=bias))
    case = replace(case, tilt=tilt, labels=None)
    theirs, their_gradients = dense(case)
    ours, our_gradients = fused(case)
    assert theirs.kl_M is not None
    assert torch.isfinite(theirs.kl_M).all()
    assert apart(ours.kl_M, theirs.kl_M) < 1e-5
    assert apart(our_gradients[0], their_gradients[0]) < 1e-4


def test_the_reference_at_itself_needs_one_product_and_says_the_same() -> None:
    case = with_both(8)
    assert case.tilt is not None
    tilt = replace(case.tilt, hidden_MD=case.hidden, head=case.head)
    alone = fused_losses(case.hidden, case.head, tilt=tilt)
    twice = fused_losses(case.hidden.clone(), case.head, tilt=tilt)
    assert alone.kl_M is not None
    assert torch.equal(alone.kl_M, twice.kl_M)  # type: ignore[arg-type]
    assert not alone.loss.requires_grad


def test_no_rows_are_no_loss() -> None:
    case = with_both(0)
    labels = Labels(next_M=torch.zeros(0, dtype=torch.long), weights_M=torch.zeros(0))
    hidden = case.hidden[:0].clone().requires_grad_()
    loss = fused_losses(hidden, case.head, labels=labels).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0


def test_the_expectation_of_r_is_that_of_the_equations() -> None:
    seen = 0
    for seed in range(SHAPES // 5):
        tilt = some_case(seed).tilt
        if tilt is None:
            continue
        seen += 1
        ours = expected_satisfaction(tilt, chunk_rows=1 + seed % 41)
        wide = some_case(seed).to(torch.float64).tilt
        assert wide is not None
        theirs = equations.expected_satisfaction_logprobs(
            torch.nn.functional.linear(wide.hidden_MD, wide.head.weight_VD, wide.head.bias_V),
            logits_of_r(wide),
        )
        for mine, exact in zip(ours, theirs, strict=True):
            assert mine.dtype == torch.float32
            assert float((mine - exact).abs().max()) < 2e-5, seed
        ones = torch.stack(ours).double().exp().sum(0)
        torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-5)
    assert seen > SHAPES / 10


@pytest.mark.parametrize(
    ("rows", "most", "expected"), [(223, 222, 112), (222, 222, 222), (5, 9, 5)]
)
def test_chunks_are_of_one_size(rows: int, most: int, expected: int) -> None:
    case = with_both(0)
    repeated = case.hidden[:1].repeat(rows, 1)
    labels = Labels(next_M=torch.zeros(rows, dtype=torch.long), weights_M=torch.ones(rows))
    seen: list[int] = []
    product = fused_module._product

    def watched(hidden_CD: Tensor, head: Head, buffer: Tensor) -> Tensor:
        seen.append(len(hidden_CD))
        return product(hidden_CD, head, buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_module, "_product", watched)
        fused_losses(repeated, case.head, labels=labels, chunk_rows=most)
    assert max(seen) == expected
    assert sum(seen) == rows
    assert max(seen) - min(seen) <= 1


def test_chunks_follow_a_budget_with_a_floor() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows_for(1_000, cpu) > 10_000
    assert chunk_rows_for(50_257, cpu) == 500
    assert chunk_rows_for(256_000, cpu) == 128
    assert chunk_rows_for(256_000, gpu) == 512


def compile_on_cpus(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    """Take the way of GPUs here."""
    monkeypatch.setattr(fused_module, "_COMPILED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(fused_module, "_COMPILED_FROM", 0)
    for name, function in (("_GRADIENT", "_gradient"), ("_EXPECTATIONS", "_expectations")):
        bare = inspect.unwrap(getattr(fused_module, function))  # without the checks of these tests
        monkeypatch.setattr(fused_module, name, fused_module._Compiled(bare))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def check_kinds_of_rows() -> None:
    """Rows with a KL, with labels and with both have what the equations say of them."""
    kinds = set()
    for seed in (0, 3, 11):
        case = some_case(seed)
        kinds.add((case.tilt is not None, case.labels is not None))
        theirs, their_gradients = dense(case)
        ours, our_gradients = fused(case, chunk_rows=10)
        for mine, right in zip(our_gradients, their_gradients, strict=True):
            assert apart(mine, right) < 1e-4
        assert apart(ours.loss, theirs.loss) < 1e-4
        if case.tilt is not None:
            satisfied, violated = expected_satisfaction(case.tilt)
            logits_TV = torch.nn.functional.linear(
                case.tilt.hidden_MD, case.tilt.head.weight_VD, case.tilt.head.bias_V
            )
            right = equations.expected_satisfaction_logprobs(logits_TV, logits_of_r(case.tilt))
            assert apart(satisfied, right[0].double()) < 1e-4
            assert apart(violated, right[1].double()) < 1e-4
    assert kinds == {(True, True), (True, False), (False, True)}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_what_is_compiled_on_gpus_says_the_same(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    compile_on_cpus(monkeypatch, backend)
    torch._dynamo.reset()
    counters.clear()
    check_kinds_of_rows()
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert not fused_module._GRADIENT._failed
    assert not fused_module._EXPECTATIONS._failed


def test_without_a_compiler_the_loss_is_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object) -> NoReturn:
        raise RuntimeError("no compiler here")

    compile_on_cpus(monkeypatch, missing)
    with pytest.warns(UserWarning, match=r"not compiled and takes longer: .*") as told:
        check_kinds_of_rows()
    assert len(told) == 2, "once for each of the two"
