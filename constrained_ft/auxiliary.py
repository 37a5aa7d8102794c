"""The auxiliary model R: the probability that a partial completion ends satisfied.

Shape suffixes:  N rollouts, T completion positions, D hidden width, V vocabulary, R rank,
J R's that are multiplied.

All kinds share one form, so that the target, the loss and guided decoding know only this:

    u[n, t, v] = logit R(x, y_<t v) = offset[n, t] + factors[n, t] . tokens[v] + prior[v]

`tokens` are the LLM's token embeddings times a learned matrix, `prior` the evidence of each token
on its own. The kinds differ in how the LLM's hidden states become `factors` and `offset`:

    additive     offset = prompt bias + running sum of the evidence of the tokens so far
    transformer  a causal transformer reads the hidden states and the evidence so far
    head         both are linear in the current hidden state

Of several constraints R is one such model, fitted to all together, or the product of one for each
(`auxiliary.terms`). Everything that reads R therefore has an axis J, of one R or of several.

One pass scores every next token at every position. R is a plain `nn.Module`, never a transformers
one: that library re-initialises linear layers of its own models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from constrained_ft import equations
from constrained_ft.config import AuxiliaryConfig
from constrained_ft.decoding import Guide
from constrained_ft.errors import CheckpointError
from constrained_ft.fused import Guidance, Head
from constrained_ft.randomness import seed_everything
from constrained_ft.rollouts import Rollouts

LOGIT_LIMIT = 15.0
# What files of an auxiliary that say something else than they should may raise.
_UNFIT = (OSError, LookupError, TypeError, RuntimeError, ValueError, AttributeError)
_PRIOR_LIMIT = 8.0
_WEIGHTS, _SHAPE = "auxiliary.safetensors", "config.json"
_TOKENS = "tokens_VR"  # the name of the table in that file


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """R at every position, before the product with the vocabulary."""

    factors_NTJR: Float[Tensor, "N T J R"]
    offset_NTJ: Float[Tensor, "N T J"]

    @classmethod
    def joined(cls, each: Sequence["Evidence"]) -> "Evidence":
        """That of several R, whose product is R."""
        return cls(
            factors_NTJR=torch.cat([one.factors_NTJR for one in each], 2),
            offset_NTJ=torch.cat([one.offset_NTJ for one in each], 2),
        )


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """What R knows of each token of the vocabulary."""

    tokens_JVR: Float[Tensor, "J V R"]
    prior_JV: Float[Tensor, "J V"]

    @classmethod
    def joined(cls, each: Sequence["TokenTable"]) -> "TokenTable":
        """That of several R, whose product is R."""
        return cls(
            tokens_JVR=torch.cat([one.tokens_JVR for one in each]),
            prior_JV=torch.cat([one.prior_JV for one in each]),
        )

    def each(self) -> list["TokenTable"]:
        """That of each R alone."""
        return [
            TokenTable(tokens_JVR=self.tokens_JVR[j, None], prior_JV=self.prior_JV[j, None])
            for j in range(len(self.prior_JV))
        ]

    def logits(
        self, factors: Float[Tensor, "*N J R"], offset: Float[Tensor, "*N J"]
    ) -> Float[Tensor, "*N V"]:
        """logit R of every next token."""
        return equations.auxiliary_logits(
            factors, offset, self.tokens_JVR, self.prior_JV, LOGIT_LIMIT
        )

    def guidance(
        self,
        head: Head,
        hidden_MD: Float[Tensor, "M D"],
        factors_MJR: Float[Tensor, "M J R"],
        offset_MJ: Float[Tensor, "M J"],
    ) -> Guidance:
        """What R says of every next token of a reference, for losses that need all of them."""
        return Guidance(
            hidden_MD=hidden_MD,
            head=head,
            factors_MJR=factors_MJR,
            offset_MJ=offset_MJ,
            tokens_JVR=self.tokens_JVR,
            prior_JV=self.prior_JV,
            limit=LOGIT_LIMIT,
        )

    def logits_of(
        self,
        factors_NTJR: Float[Tensor, "N T J R"],
        offset_NTJ: Float[Tensor, "N T J"],
        ids_NT: Int[Tensor, "N T"],
    ) -> Float[Tensor, "N T"]:
        """logit R after the given tokens: a gather instead of the whole vocabulary."""
        logits_NTJ = self.logits_of_each(factors_NTJR, offset_NTJ, ids_NT)
        return equations.product_logits(logits_NTJ.unbind(-1))

    def logits_of_each(
        self,
        factors_NTJR: Float[Tensor, "N T J R"],
        offset_NTJ: Float[Tensor, "N T J"],
        ids_NT: Int[Tensor, "N T"],
    ) -> Float[Tensor, "N T J"]:
        """The same of each R alone."""
        u_NTJ = self.evidence(factors_NTJR, ids_NT) + offset_NTJ
        return u_NTJ.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def evidence(
        self, factors_NTJR: Float[Tensor, "N T J R"], ids_NT: Int[Tensor, "N T"]
    ) -> Float[Tensor, "N T J"]:
        """The evidence term of the given tokens, in logits of each R."""
        tokens_NTJR = torch.stack([F.embedding(ids_NT, one) for one in self.tokens_JVR], 2)
        return (factors_NTJR * tokens_NTJR).sum(-1) + self.prior_of(ids_NT)

    def prior_of(self, ids_NT: Int[Tensor, "N T"]) -> Float[Tensor, "N T J"]:
        """The prior of the given tokens.

        `F.embedding`, as above: the backward pass of plain indexing adds up the gradients of equal
        tokens in an order that differs from run to run when there are several threads.
        """
        return F.embedding(ids_NT, self.prior_JV.T)


class Auxiliary(nn.Module):
    """One R, in one of its three kinds."""

    def __init__(
        self,
        config: AuxiliaryConfig,
        embeddings_VD: Float[Tensor, "W D"],
        prior_V: Float[Tensor, " V"],
        *,
        seed: int,
    ) -> None:
        """Start as the prior alone.

        Args:
            config: the `auxiliary` section.
            embeddings_VD: the LLM's token embeddings, kept frozen; one row where no table will be
                built from them.
            prior_V: evidence of each token on its own, in logits; zeros for none.
            seed: of the initial weights.
        """
        super().__init__()
        self.config = config
        width = embeddings_VD.shape[1]
        # Unit rows: the scale of embeddings differs between families of models.
        scale = embeddings_VD.float().pow(2).mean().sqrt().clamp_min(1e-6)
        self.register_buffer("embeddings_VD", embeddings_VD.float() / scale, persistent=False)
        self.register_buffer("prior_V", prior_V.float().clone())
        self.embeddings_VD: Tensor
        self.prior_V: Tensor
        inner = config.width if config.kind == "transformer" else width
        with seed_everything(seed):
            self.project_tokens = nn.Linear(width, config.rank, bias=False)
            self.evidence = nn.Linear(inner, config.rank)
            self.state = nn.Linear(inner, 1)
            self.root = nn.Linear(width, 1)
            if config.kind == "transformer":
                self.reader = _Reader(width, config.width, config.layers)
        # No opinion beyond the prior before the first sample: R starts at the base rate.
        nn.init.zeros_(self.evidence.weight)
        nn.init.zeros_(self.evidence.bias)
        for layer in (self.state, self.root):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.prior_gain = nn.Parameter(torch.ones(()))
        # What any token adds: typical ones must add nothing, whatever their prior.
        self.drift = nn.Parameter(torch.zeros(()))

    def table(self) -> TokenTable:
        """The vocabulary's side of R."""
        return self._table(self.embeddings_VD, self.prior_V)

    def table_of(self, ids_NT: Int[Tensor, "N T"]) -> tuple[TokenTable, Int[Tensor, "N T"]]:
        """The part of the table that some tokens need, and their places in it: far cheaper."""
        used_U, place_NT = ids_NT.unique(return_inverse=True)
        return self._table(self.embeddings_VD[used_U], self.prior_V[used_U]), place_NT

    def _table(self, embeddings_UD: Tensor, prior_U: Tensor) -> TokenTable:
        return TokenTable(
            tokens_JVR=self.project_tokens(embeddings_UD)[None],
            prior_JV=(self.prior_gain * prior_U + self.drift)[None],
        )

    @property
    def each(self) -> tuple["Auxiliary", ...]:
        """The R's whose product it is: itself."""
        return (self,)

    @property
    def scalars(self) -> list[nn.Parameter]:
        """The few numbers that set the scale of everything else."""
        return [self.prior_gain, self.drift, self.root.bias, self.state.bias]

    def start_at(self, rate: float) -> None:
        """Put the bias at the logit of an observed satisfaction rate."""
        bias = torch.logit(torch.tensor(rate).clamp(0.01, 0.99))
        for layer in (self.root, self.state):
            nn.init.constant_(layer.bias, float(bias))

    def forward(
        self,
        table: TokenTable,
        hidden_NTD: Float[Tensor, "N T D"],
        ids_NT: Int[Tensor, "N T"],
        mask_NT: Bool[Tensor, "N T"],
    ) -> Evidence:
        """R at every position of some completions.

        Args:
            table: `self.table()`, or a part of it in which `ids_NT` are places.
            hidden_NTD: the reference's hidden states that predict each completion token.
            ids_NT: completion tokens; column t is read by positions after t only.
            mask_NT: True at completion tokens.
        """
        hidden_NTD = F.layer_norm(hidden_NTD.float(), hidden_NTD.shape[-1:])
        match self.config.kind:
            case "head":
                factors_NTJR = self.evidence(hidden_NTD)[:, :, None]
                return Evidence(factors_NTJR=factors_NTJR, offset_NTJ=self.state(hidden_NTD))
            case "additive":
                factors_NTJR = self.evidence(hidden_NTD)[:, :, None]
                evidence_NT = table.evidence(factors_NTJR, ids_NT)[..., 0]
                root_N = self.root(hidden_NTD[:, 0])[..., 0]
                offset_NT = equations.additive_offsets(evidence_NT, mask_NT, root_N)
                return Evidence(factors_NTJR=factors_NTJR, offset_NTJ=offset_NT[..., None])
            case "transformer":
                prior_NT = table.prior_of(ids_NT)[..., 0]
                root_N = self.root(hidden_NTD[:, 0])[..., 0]
                so_far_NT = equations.additive_offsets(prior_NT, mask_NT, root_N)
                read_NTW = self.reader(hidden_NTD, so_far_NT - root_N[:, None])
                correction_NT = self.state(read_NTW)[..., 0] - self.state.bias
                return Evidence(
                    factors_NTJR=self.evidence(read_NTW)[:, :, None],
                    offset_NTJ=(so_far_NT + correction_NT)[..., None],
                )

    @torch.no_grad()
    def frozen(self) -> "FrozenAuxiliary":
        """A copy that fitting cannot change."""
        copy = Auxiliary(
            self.config, torch.zeros_like(self.embeddings_VD[:1]), self.prior_V, seed=0
        )
        copy.load_state_dict(self.state_dict())
        copy.to(self.prior_V.device).requires_grad_(requires_grad=False).eval()
        table = self.table()
        own = TokenTable(tokens_JVR=table.tokens_JVR.clone(), prior_JV=table.prior_JV.clone())
        return FrozenAuxiliary([copy], own)


class ProductAuxiliary(nn.Module):
    """R as the product of one R for each term of a constraint.

    It is exact where the terms are independent given the text so far; `term_heads` watches how far
    they are from it.
    """

    def __init__(self, each: Sequence[Auxiliary]) -> None:
        """Multiply some, which share one copy of the LLM's embeddings from here on.

        Args:
            each: one for each term, in their order.
        """
        super().__init__()
        self.terms = nn.ModuleList(each)
        for one in each:
            one.embeddings_VD = each[0].embeddings_VD

    @property
    def each(self) -> tuple[Auxiliary, ...]:
        """The R of every term, in their order."""
        return tuple(self.terms)  # type: ignore[arg-type]  # a list of any modules

    def frozen(self) -> "FrozenAuxiliary":
        """A copy that fitting cannot change."""
        return FrozenAuxiliary.product([one.frozen() for one in self.each])


class FrozenAuxiliary:
    """R as it was fitted; what the target, guided decoding and the run folder keep."""

    def __init__(self, each: Sequence[Auxiliary], table: TokenTable) -> None:
        """R as the product of some, mostly of one.

        Args:
            each: not to be fitted again.
            table: the vocabulary's side of all of them.
        """
        self._each = tuple(each)
        self.table = table

    @classmethod
    def product(cls, factors: Sequence["FrozenAuxiliary"]) -> "FrozenAuxiliary":
        """The product of several."""
        each = [one for factor in factors for one in factor._each]
        return cls(each, TokenTable.joined([factor.table for factor in factors]))

    @property
    def kind(self) -> str:
        """`additive`, `transformer` or `head`."""
        return self._each[0].config.kind

    @property
    def adds_up(self) -> bool:
        """Whether logit R is a prompt bias plus the evidence of each token."""
        return self.kind == "additive" and len(self._each) == 1

    @property
    def hidden_size(self) -> int:
        """Width of the LLM's hidden states that it reads."""
        return self._each[0].root.in_features

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows."""
        return self.table.prior_JV.shape[-1]

    @torch.no_grad()
    def read(self, rollouts: Rollouts) -> Evidence:
        """R at every position of some rollouts of the LLM it was fitted to."""
        return self.read_examples(rollouts.hidden_NTD, rollouts.ids_NT, rollouts.mask_NT)

    @torch.no_grad()
    def read_examples(
        self,
        hidden_NTD: Float[Tensor, "N T D"],
        ids_NT: Int[Tensor, "N T"],
        mask_NT: Bool[Tensor, "N T"],
    ) -> Evidence:
        """The same for bare tensors."""
        found = [
            one(table, hidden_NTD, ids_NT, mask_NT)
            for one, table in zip(self._each, self.table.each(), strict=True)
        ]
        return Evidence.joined(found)

    @torch.no_grad()
    def satisfaction_of_each(self, rollouts: Rollouts) -> Float[Tensor, "N T J"]:
        """After each token of some completions, every R whose product R is."""
        evidence = self.read(rollouts)
        logits_NTJ = self.table.logits_of_each(
            evidence.factors_NTJR, evidence.offset_NTJ, rollouts.ids_NT
        )
        return logits_NTJ.sigmoid()

    def guide(self, strength: float = 1.0) -> Guide:
        """For guided decoding: log R of every next token after the tokens so far, times `strength`.

        Samples then come from q ∝ p R^strength, token by token: 0 is p, 1 the target q*, and more
        demands more than the constraint did.
        """

        @torch.no_grad()
        def log_satisfaction(hidden_BTD: Tensor, past_BT: Tensor) -> Tensor:
            # R at the last position reads all tokens but the one to come.
            ids_BT = F.pad(past_BT, (0, 1))
            mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            evidence = self.read_examples(hidden_BTD, ids_BT, mask_BT)
            u_BV = self.table.logits(evidence.factors_NTJR[:, -1], evidence.offset_NTJ[:, -1])
            return strength * F.logsigmoid(u_BV)

        return log_satisfaction

    def save(self, folder: Path) -> None:
        """Write safetensors and a JSON file; self-contained."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        places = _places(len(self._each))
        for place, one, table in zip(places, self._each, self.table.each(), strict=True):
            own = dict(one.state_dict()) | {_TOKENS: table.tokens_JVR[0].clone()}
            tensors |= {place + name: tensor for name, tensor in own.items()}
        safetensors.torch.save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / _WEIGHTS
        )
        shape = {
            "auxiliary": self._each[0].config.model_dump(),
            "hidden_size": self.hidden_size,
        }
        (folder / _SHAPE).write_text(json.dumps(shape, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "FrozenAuxiliary":
        """Read what `save` wrote.

        Raises:
            CheckpointError: when a file is missing or does not fit.
        """
        try:
            shape: dict[str, Any] = json.loads((folder / _SHAPE).read_text())
            tensors = safetensors.torch.load_file(folder / _WEIGHTS, device=str(device))
            count = sum(name.endswith(_TOKENS) for name in tensors)
            return cls.product([_one_of(shape, tensors, place) for place in _places(count)])
        except (*_UNFIT, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{folder} holds no readable auxiliary: {error}") from error


def _places(count: int) -> list[str]:
    """What the names of each R's tensors begin with in a file of so many."""
    return [""] if count == 1 else [f"{j}." for j in range(count)]


def _one_of(shape: dict[str, Any], tensors: Mapping[str, Tensor], place: str) -> FrozenAuxiliary:
    """One R of a file."""
    own = {n.removeprefix(place): tensor for n, tensor in tensors.items() if n.startswith(place)}
    tokens_VR = own.pop(_TOKENS)
    config = AuxiliaryConfig.model_validate(shape["auxiliary"])
    module = Auxiliary(config, torch.zeros(1, shape["hidden_size"]), own["prior_V"], seed=0)
    module.load_state_dict(own)
    module.to(tokens_VR.device).requires_grad_(requires_grad=False).eval()
    prior_V = module.prior_gain * module.prior_V + module.drift
    table = TokenTable(tokens_JVR=tokens_VR[None], prior_JV=prior_V[None])
    return FrozenAuxiliary([module], table)


class _Reader(nn.Module):
    """A small causal transformer over hidden states and the evidence so far."""

    def __init__(self, hidden: int, width: int, layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden + 1, width)
        block = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=2 * width,
            dropout=0.1,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

    def forward(
        self, hidden_NTD: Float[Tensor, "N T D"], so_far_NT: Float[Tensor, "N T"]
    ) -> Float[Tensor, "N T W"]:
        features = torch.cat([hidden_NTD, so_far_NT[..., None] / 4], -1)
        steps = features.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool, device=features.device).triu(1)
        read: Tensor = self.blocks(self.project(features), mask=causal, is_causal=True)
        return read


def vocabulary_prior(
    score_tokens_V: Float[Tensor, " V"], score_nothing: float
) -> Float[Tensor, " V"]:
    """Evidence of each token on its own: log odds of its score against those of the empty text.

    Cut at 8 on both sides: one token that is certain on its own may not be so in a text.
    """
    odds_V = torch.logit(score_tokens_V.double(), eps=1e-6)
    nothing = torch.logit(torch.tensor(score_nothing, dtype=torch.float64), eps=1e-6)
    return (odds_V - nothing).clamp(-_PRIOR_LIMIT, _PRIOR_LIMIT).float()
