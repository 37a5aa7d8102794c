"""The LLM update's loss from hidden states, in one exact pass: logits never exist all together.

Shape suffixes:  M rows (prefixes and corpus positions), D hidden width, V vocabulary, R rank,
J R's that are multiplied.

    row loss = kl_weight * KL(q || p_theta) + ce_weight * (-log p_theta(next))
    q  ∝  p_ref (floor + (1 - floor) R)
    R  =  prod_j sigmoid(offset_j + factors_j . tokens_j + prior_j)

`equations.target_logprobs` and `equations.kl_to_target` are the definition; here the same numbers
are computed with four products with the vocabulary (LLM, reference, R, gradient), the first two in
one where the head is the same, and a buffer of a few hundred rows for each but the last; a further
R takes one more of both. The gradient to a row's logits,

    (kl_weight + ce_weight) p_theta - kl_weight q - ce_weight 1[next],

is known as soon as the row is, so the forward pass ends with the gradients to the hidden states
and the head, and the backward pass multiplies them by a number. The products run on chunks of rows;
what lies between them runs on tiles of a chunk that stay in a CPU's cache, and so does R, or is one
compiled kernel on a GPU.

The fit of R needs the expectation of R under the reference: the same products with another end.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from constrained_ft.machine import CPU_PRODUCTS

_CHUNK_BYTES = 3 * 2**26  # of two float32 buffers [rows, V]
_FEWEST_ROWS = {"cpu": 128, "cuda": 512}  # of a chunk; products with fewer are slow
_EVIDENCE_ROWS = {"cpu": 64}  # of R's products, which are small; elsewhere all of a chunk
_TILE_BYTES = 3 * 2**20  # of one buffer between the products, on CPUs
_COMPILED_ON = frozenset({"cuda"})  # where passes over memory are what takes long
_COMPILED_FROM = 2**22  # logits of a chunk; for fewer, compiling takes longer than it saves

Inputs = ParamSpec("Inputs")
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head: logits = hidden @ weight.T + bias, in float32.

    KL divergences of 0.01 nat drown in the rounding of bfloat16 logits.
    """

    weight_VD: Float[Tensor, "V D"]
    bias_V: Float[Tensor, " V"] | None
    bf16_valued: bool
    """Weights and hidden states are bfloat16 numbers: `fast_products` loses nothing forward."""

    def __call__(self, hidden_ND: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Next-token logits, float32."""
        with self.fast_products():
            return F.linear(hidden_ND.float(), self.weight_VD, self.bias_V)

    @contextmanager
    def fast_products(self) -> Iterator[None]:
        """Multiply on bfloat16 units where both factors are bfloat16 numbers anyway.

        Products are summed and returned in float32, so the forward pass is as exact as in float32
        and twice as fast. Backward passes round the gradient of the logits to 8 bits. On CPUs only:
        elsewhere nothing changes.
        """
        if not (self.bf16_valued and self.weight_VD.device.type == "cpu"):
            yield
            return
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
        with CPU_PRODUCTS:
            before = products.fp32_precision
            products.fp32_precision = "bf16"
            try:
                yield
            finally:
                products.fp32_precision = before

    def frozen(self) -> "Head":
        """This head as it is now; trained weights are copied, frozen ones shared."""

        def keep(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if tensor.requires_grad else tensor

        bias = None if self.bias_V is None else keep(self.bias_V)
        return replace(self, weight_VD=keep(self.weight_VD), bias_V=bias)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The reference's hidden states and head, and R, at some rows."""

    hidden_MD: Float[Tensor, "M D"]
    head: Head
    factors_MJR: Float[Tensor, "M J R"]
    offset_MJ: Float[Tensor, "M J"]
    tokens_JVR: Float[Tensor, "J V R"]
    prior_JV: Float[Tensor, "J V"]
    limit: float
    """Logits of each R are cut here."""


@dataclass(frozen=True, kw_only=True)
class Tilt(Guidance):
    """What makes q of some rows, and how much they count."""

    floor_M: Float[Tensor, " M"] | None
    """alpha of each row; None is 0 everywhere."""
    weights_M: Float[Tensor, " M"]
    """kl_weight of each row."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The corpus tokens of some rows."""

    next_M: Int[Tensor, " M"]
    weights_M: Float[Tensor, " M"]
    """ce_weight of each row."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of every row, in nats, unweighted."""

    loss: Float[Tensor, ""]
    """The weighted sum; it alone carries a gradient."""
    kl_M: Float[Tensor, " M"] | None
    ce_M: Float[Tensor, " M"] | None
    log_satisfaction_M: Float[Tensor, " M"] | None
    """log Rbar: log of the expectation of floor + (1 - floor) R under the reference."""


def fused_losses(
    hidden_MD: Float[Tensor, "M D"],
    head: Head,
    *,
    tilt: Tilt | None = None,
    labels: Labels | None = None,
    chunk_rows: int | None = None,
) -> Losses:
    """KL to the target and cross-entropy of some rows, with the gradient of their weighted sum.

    Args:
        hidden_MD: last hidden states of the LLM; float32, or bfloat16 that is multiplied as such.
        head: the LLM's head; trained where its weight requires a gradient.
        tilt: q of every row, or None for rows that carry no KL.
        labels: the next token of every row, or None for rows without cross-entropy.
        chunk_rows: rows whose logits exist at once; None derives it from a budget in bytes.

    Source: [CFT], the regulariser in its closed form; the formulas are those of `equations`.
    """
    rows = _chunk_rows(hidden_MD, head, chunk_rows)
    same = tilt is not None and tilt.hidden_MD is hidden_MD and tilt.head is head
    call = _Call(head=head, tilt=tilt, labels=labels, chunk_rows=rows, same=same)
    loss, kl_M, ce_M, log_satisfaction_M = _FusedLosses.apply(  # type: ignore[no-untyped-call]
        hidden_MD, head.weight_VD, head.bias_V, call
    )
    return Losses(loss=loss, kl_M=kl_M, ce_M=ce_M, log_satisfaction_M=log_satisfaction_M)


@torch.no_grad()
def expected_satisfaction(
    guidance: Guidance, *, chunk_rows: int | None = None
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """(log Rbar, log(1 - Rbar)) of every row: what R is expected to say one token later.

    Args:
        guidance: the reference and R.
        chunk_rows: rows whose logits exist at once; None derives it from a budget in bytes.

    Source: [NADO]; the definition is `equations.expected_satisfaction_logprobs`.
    """
    hidden_MD, size = guidance.hidden_MD, len(guidance.head.weight_VD)
    rows = _chunk_rows(hidden_MD, guidance.head, chunk_rows)
    logits = hidden_MD.new_empty(rows, size, dtype=_wide(hidden_MD))
    found = hidden_MD.new_empty(2, len(hidden_MD), dtype=_wide(hidden_MD))
    for chunk in _slices(slice(0, len(hidden_MD)), rows):
        t_CV = _product(hidden_MD[chunk], guidance.head, logits)
        for tile, us in _tiles(t_CV, guidance, chunk):
            assert us is not None
            part = _moved(tile, chunk.start)
            evidence = _evidence_of(guidance, part)
            found[:, part] = _EXPECTATIONS(t_CV[tile], us, evidence)
    return found[0], found[1]


class _Evidence(NamedTuple):
    """What R's products lack, at some rows."""

    offset_BJ: Tensor
    prior_JV: Tensor
    limit: float


def _expectations(t: Tensor, us: Tensor, evidence: _Evidence) -> Tensor:
    """log Rbar and log(1 - Rbar) from logits of the reference and products of R; uses both up."""
    t -= t.amax(-1, keepdim=True)
    p = t.exp_()  # but for a factor
    r, rest = us[0], None
    for j, u in enumerate(us):
        _cut(u, evidence, j)
        # 1 - R would lose the digits that matter where R is near 1.
        complement = torch.sigmoid(-u)
        u.sigmoid_()
        rest = complement if rest is None else rest.add_(complement.mul_(r))
        if j > 0:
            r *= u
    assert rest is not None
    sums_2B = torch.stack([r.mul_(p).sum(-1), rest.mul_(p).sum(-1)])
    # Many R that all say no can have a product that float32 cannot say.
    sums_2B.clamp_(min=torch.finfo(p.dtype).tiny)
    return (sums_2B.log_() - p.sum(-1).log_()).clamp_(max=0.0)


def _chunk_rows(hidden_MD: Tensor, head: Head, most: int | None) -> int:
    """Rows of a chunk, the last one too: products of a few rows left over would be slow."""
    rows = len(hidden_MD)
    chunks = max(
        1, math.ceil(rows / (most or chunk_rows_for(len(head.weight_VD), hidden_MD.device)))
    )
    return max(1, math.ceil(rows / chunks))


def chunk_rows_for(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits exist at once, from a budget in bytes with a floor."""
    return max(_CHUNK_BYTES // (8 * vocabulary), _FEWEST_ROWS.get(device.type, 512))


def buffered_rows(vocabulary: int, num_auxiliaries: int, device: torch.device) -> int:
    """Rows of logits that one loss holds, at most: of the LLM, of the reference and of each R."""
    rows = chunk_rows_for(vocabulary, device)
    return 2 * rows + num_auxiliaries * _evidence_rows(rows, device)


@dataclass(frozen=True, kw_only=True)
class _Call:
    head: Head
    tilt: Tilt | None
    labels: Labels | None
    chunk_rows: int
    same: bool
    """The LLM is the reference: one product serves both."""


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        wanted = ctx.needs_input_grad
        work = _Work(hidden_MD, call, wants_gradient=any(wanted[:3]), trains_head=wanted[1])
        for chunk in _slices(slice(0, len(hidden_MD)), call.chunk_rows):
            work.chunk(chunk)
        ctx.dtype = hidden_MD.dtype
        ctx.save_for_backward(work.gradient_MD, work.gradient_VD, work.gradient_V)
        found = (work.kl_M, work.ce_M, work.log_satisfaction_M)
        ctx.mark_non_differentiable(*(tensor for tensor in found if tensor is not None))
        ctx.set_materialize_grads(False)
        return (work.loss(), *found)

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        upstream = grad_outputs[0]
        gradients = [
            None if gradient is None or upstream is None or not wanted else gradient * upstream
            for gradient, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        if gradients[0] is not None:
            gradients[0] = gradients[0].to(ctx.dtype)
        return gradients[0], gradients[1], gradients[2], None


class _Work:
    """One call: buffers, results and gradients."""

    def __init__(
        self, hidden_MD: Tensor, call: _Call, *, wants_gradient: bool, trains_head: bool
    ) -> None:
        head, rows = call.head, min(call.chunk_rows, len(hidden_MD))
        size = len(head.weight_VD)
        self.hidden_MD, self.call = hidden_MD, call
        self.wants_gradient = wants_gradient

        # Logits of the LLM, then those of the reference.
        both = rows if call.tilt is None else 2 * rows
        self.logits = hidden_MD.new_empty(both, size, dtype=_wide(hidden_MD))
        self.ce_M = self._result() if call.labels else None
        self.kl_M = self._result() if call.tilt else None
        self.log_satisfaction_M = self._result() if call.tilt else None
        self.gradient_MD = hidden_MD.new_empty(hidden_MD.shape, dtype=_wide(hidden_MD))
        self.gradient_VD = torch.zeros_like(head.weight_VD) if trains_head else None
        self.gradient_V = (
            torch.zeros_like(head.bias_V) if trains_head and head.bias_V is not None else None
        )
        # A head excludes a token by a bias of -inf; 0 * -inf counts as 0.
        bias_V = call.tilt.head.bias_V if call.tilt else None
        self.excludes = bias_V is not None and bool(bias_V.isinf().any())

    def _result(self) -> Tensor:
        """A number of each row."""
        return self.hidden_MD.new_empty(len(self.hidden_MD), dtype=_wide(self.hidden_MD))

    def chunk(self, chunk: slice) -> None:
        """Losses and gradients of some rows."""
        call, hidden_CD = self.call, self.hidden_MD[chunk]
        logits_CV, target_CV = self._logits(chunk)
        for tile, evidence_JBV in _tiles(logits_CV, call.tilt, chunk):
            rows = _moved(tile, chunk.start)
            self._tile(rows, logits_CV[tile], target_CV[tile], evidence_JBV)
        if self.wants_gradient:
            with call.head.fast_products():
                torch.mm(logits_CV, call.head.weight_VD, out=self.gradient_MD[chunk])
        if self.gradient_VD is not None:
            self.gradient_VD.addmm_(logits_CV.T, hidden_CD.to(logits_CV.dtype))
        if self.gradient_V is not None:
            self.gradient_V += logits_CV.sum(0)

    def _logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Of the LLM and of the reference, of both in one product where they share a head."""
        head, tilt, hidden_CD = self.call.head, self.call.tilt, self.hidden_MD[chunk]
        if tilt is None:
            return (_product(hidden_CD, head, self.logits),) * 2
        own_CV, other_CV = self.logits[: 2 * len(hidden_CD)].chunk(2)
        if self.call.same:
            other_CV.copy_(_product(hidden_CD, head, own_CV))
        elif head.weight_VD is tilt.head.weight_VD and head.bias_V is tilt.head.bias_V:
            _product(torch.cat([hidden_CD, tilt.hidden_MD[chunk]]), head, self.logits)
        else:
            _product(hidden_CD, head, own_CV)
            _product(tilt.hidden_MD[chunk], tilt.head, other_CV)
        return own_CV, other_CV

    def _tile(self, rows: slice, z: Tensor, t: Tensor, us: Tensor | None) -> None:
        """Turn logits `z` of the LLM into the gradient, in place; `t`, `us`: reference and R."""
        tilt, labels = self.call.tilt, self.call.labels
        found = _GRADIENT(
            z,
            None
            if tilt is None or us is None
            else _TiltRows(
                t=t,
                us=us,
                evidence=_evidence_of(tilt, rows),
                floor_B=None if tilt.floor_M is None else tilt.floor_M[rows],
                weights_B=tilt.weights_M[rows],
                excludes=self.excludes,
            ),
            None
            if labels is None
            else _LabelRows(next_B=labels.next_M[rows], weights_B=labels.weights_M[rows]),
            wants_gradient=self.wants_gradient,
        )
        results = (self.kl_M, self.ce_M, self.log_satisfaction_M)
        for result_M, part_B in zip(results, found, strict=True):
            if result_M is not None and part_B is not None:
                result_M[rows] = part_B

    def loss(self) -> Tensor:
        """The weighted sum of all rows."""
        total = self.hidden_MD.new_zeros((), dtype=_wide(self.hidden_MD))
        for losses_M, part in ((self.kl_M, self.call.tilt), (self.ce_M, self.call.labels)):
            if losses_M is not None and part is not None:
                # A row of weight 0 counts nothing, whatever its loss.
                used_M = part.weights_M != 0
                total = total + (losses_M[used_M] * part.weights_M[used_M]).sum()
        return total


class _TiltRows(NamedTuple):
    """What makes q of some rows: the reference's logits `t` and R's products `us`, used up."""

    t: Tensor
    us: Tensor
    evidence: _Evidence
    floor_B: Tensor | None
    weights_B: Tensor
    excludes: bool


class _LabelRows(NamedTuple):
    next_B: Tensor
    weights_B: Tensor


def _gradient(
    z: Tensor, tilt: _TiltRows | None, labels: _LabelRows | None, *, wants_gradient: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Turn logits `z` of the LLM into their gradient; (KL, cross-entropy, log Rbar) of the rows."""
    kl_B = ce_B = log_satisfaction_B = None
    z -= z.amax(-1, keepdim=True)
    weight_B1 = pull_B1 = z.new_zeros(len(z), 1)
    if labels is not None:
        ce_B = -z.gather(1, labels.next_B[:, None])[:, 0]
    if tilt is not None:
        t = tilt.t
        q, q_sum_B, log_satisfaction_B = _tilt(tilt)
        t -= z
        t *= q
        if tilt.excludes:
            t.masked_fill_(q == 0, 0.0)
        kl_B = t.sum(-1) / q_sum_B - q_sum_B.log()
        pull_B1 = (tilt.weights_B / q_sum_B)[:, None]
    p = z.exp_()  # but for a factor, as q
    p_sum_B = p.sum(-1)
    # Rounding can leave a sum of -1e-7.
    if labels is not None and ce_B is not None:
        ce_B = (ce_B + p_sum_B.log()).clamp_(min=0.0)
        weight_B1 = weight_B1 + labels.weights_B[:, None]
    if tilt is not None and kl_B is not None:
        kl_B = (kl_B + p_sum_B.log()).clamp_(min=0.0)
        weight_B1 = weight_B1 + tilt.weights_B[:, None]
    if wants_gradient:
        p *= weight_B1 / p_sum_B[:, None]
        if tilt is not None:
            p.addcmul_(tilt.us[0], pull_B1, value=-1)
        if labels is not None:
            p.scatter_add_(1, labels.next_B[:, None], -labels.weights_B[:, None].to(p.dtype))
    return kl_B, ce_B, log_satisfaction_B


def _tilt(tilt: _TiltRows) -> tuple[Tensor, Tensor, Tensor]:
    """q but for a factor, its sum, and log Rbar.

    `t` becomes the logarithm of that q, and q takes the place of the first R.
    """
    t, us = tilt.t, tilt.us
    before_B = t.logsumexp(-1)
    for j, u in enumerate(us):
        # Rounds by 1e-7, as the product of probabilities would; softplus takes twice as long.
        _cut(u, tilt.evidence, j).sigmoid_().log_()
        if j > 0:
            us[0] += u
    log_r = us[0]
    if tilt.floor_B is not None:
        floor_B1 = tilt.floor_B[:, None]
        torch.logaddexp(floor_B1.log(), torch.log1p(-floor_B1) + log_r, out=log_r)
    t += log_r
    top_B1 = t.amax(-1, keepdim=True)
    t -= top_B1
    q = torch.exp(t, out=log_r)
    q_sum_B = q.sum(-1)
    after_B = top_B1[:, 0] + q_sum_B.log()
    return q, q_sum_B, (after_B - before_B).clamp_(max=0.0)


def _evidence_of(guidance: Guidance, rows: slice) -> _Evidence:
    return _Evidence(guidance.offset_MJ[rows], guidance.prior_JV, guidance.limit)


def _cut(u: Tensor, evidence: _Evidence, j: int) -> Tensor:
    """The logit of one R from its product, in place."""
    u += evidence.prior_JV[j]
    u += evidence.offset_BJ[:, j, None]
    return u.clamp_(-evidence.limit, evidence.limit)


class _Compiled(Generic[Inputs, Found]):
    """What lies between the products: compiled where that pays, else as it is written.

    Without a compiler (Triton, on GPUs) it stays as it is; a warning says so once.
    """

    def __init__(self, function: Callable[Concatenate[Tensor, Inputs], Found]) -> None:
        self._function = function
        self._kernel: Callable[Concatenate[Tensor, Inputs], Found] | None = None
        self._failed = False

    def __call__(self, logits: Tensor, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Found:
        pays = logits.device.type in _COMPILED_ON and logits.numel() >= _COMPILED_FROM
        if not pays or self._failed:
            return self._function(logits, *args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        if self._kernel is None:
            self._kernel = torch.compile(self._function, dynamic=True)
        try:
            return self._kernel(logits, *args, **kwargs)
        except TorchDynamoException as error:  # before anything was computed
            self._failed = True
            warnings.warn(f"the loss is not compiled and takes longer: {error}", stacklevel=2)
            return self._function(logits, *args, **kwargs)


_GRADIENT = _Compiled(_gradient)
_EXPECTATIONS = _Compiled(_expectations)


def _product(hidden_CD: Tensor, head: Head, buffer: Tensor) -> Tensor:
    """Logits in float32 (float64 for float64), whatever the type of the hidden states."""
    logits_CV = buffer[: len(hidden_CD)]
    with head.fast_products():
        torch.mm(hidden_CD.to(head.weight_VD.dtype), head.weight_VD.T, out=logits_CV)
    if head.bias_V is not None:
        logits_CV += head.bias_V
    return logits_CV


def _evidence_rows(chunk_rows: int, device: torch.device) -> int:
    return min(chunk_rows, _EVIDENCE_ROWS.get(device.type, chunk_rows))


def _tiles(
    logits_CV: Tensor, guidance: Guidance | None, chunk: slice
) -> Iterator[tuple[slice, Tensor | None]]:
    """Rows of a chunk, on CPUs few enough to stay in the cache, and each R's product there.

    `_cut` adds what it lacks of the evidence.
    """
    most = len(logits_CV)
    if logits_CV.device.type == "cpu":
        most = max(1, _TILE_BYTES // (logits_CV.shape[1] * logits_CV.element_size()))
    whole = slice(0, len(logits_CV))
    if guidance is None:
        yield from ((tile, None) for tile in _slices(whole, most))
        return
    rows = _evidence_rows(len(logits_CV), logits_CV.device)
    buffer = logits_CV.new_empty(len(guidance.prior_JV), rows, logits_CV.shape[1])
    for part in _slices(whole, rows):
        evidence_JPV = _evidence(guidance, _moved(part, chunk.start), buffer)
        for tile in _slices(part, most):
            yield tile, evidence_JPV[:, _moved(tile, -part.start)]


def _evidence(guidance: Guidance, rows: slice, buffer: Tensor) -> Tensor:
    factors_PJR = guidance.factors_MJR[rows]
    evidence_JPV = buffer[:, : len(factors_PJR)]
    for j, evidence_PV in enumerate(evidence_JPV):
        factors_PR, tokens_VR = factors_PJR[:, j], guidance.tokens_JVR[j]
        torch.mm(factors_PR, tokens_VR.T, out=evidence_PV)
    return evidence_JPV


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _slices(rows: slice, most: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, most):
        yield slice(start, min(start + most, rows.stop))


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
