"""The auxiliary model R: the probability that a partial completion ends satisfied.

Shape suffixes:  N rollouts, T completion positions, D hidden width, V vocabulary, R rank.

All kinds share one form, so that the target, the loss and guided decoding know only this:

    u[n, t, v] = logit R(x, y_<t v) = offset[n, t] + factors[n, t] . tokens[v] + prior[v]

`tokens` are the LLM's token embeddings times a learned matrix, `prior` the evidence of each token
on its own. The kinds differ in how the LLM's hidden states become `factors` and `offset`:

    additive     offset = prompt bias + running sum of the evidence of the tokens so far
    transformer  a causal transformer reads the hidden states and the evidence so far
    head         both are linear in the current hidden state

One pass scores every next token at every position. R is a plain `nn.Module`, never a transformers
one: that library re-initialises linear layers of its own models.
"""

import json
from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """R at every position, before the product with the vocabulary."""

    factors_NTR: Float[Tensor, "N T R"]
    offset_NT: Float[Tensor, "N T"]


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """What R knows of each token of the vocabulary."""

    tokens_VR: Float[Tensor, "V R"]
    prior_V: Float[Tensor, " V"]

    def logits(
        self, factors: Float[Tensor, "*N R"], offset: Float[Tensor, "*N"]
    ) -> Float[Tensor, "*N V"]:
        """logit R of every next token."""
        u = F.linear(factors, self.tokens_VR, self.prior_V) + offset[..., None]
        return u.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def guidance(
        self,
        head: Head,
        hidden_MD: Float[Tensor, "M D"],
        factors_MR: Float[Tensor, "M R"],
        offset_M: Float[Tensor, " M"],
    ) -> Guidance:
        """What R says of every next token of a reference, for losses that need all of them."""
        return Guidance(
            hidden_MD=hidden_MD,
            head=head,
            factors_MR=factors_MR,
            offset_M=offset_M,
            tokens_VR=self.tokens_VR,
            prior_V=self.prior_V,
            limit=LOGIT_LIMIT,
        )

    def logits_of(
        self,
        factors_NTR: Float[Tensor, "N T R"],
        offset_NT: Float[Tensor, "N T"],
        ids_NT: Int[Tensor, "N T"],
    ) -> Float[Tensor, "N T"]:
        """logit R after the given tokens: a gather instead of the whole vocabulary."""
        u = self.evidence(factors_NTR, ids_NT) + offset_NT
        return u.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def evidence(
        self, factors_NTR: Float[Tensor, "N T R"], ids_NT: Int[Tensor, "N T"]
    ) -> Float[Tensor, "N T"]:
        """The evidence term of the given tokens, in logits."""
        tokens_NTR = F.embedding(ids_NT, self.tokens_VR)
        return (factors_NTR * tokens_NTR).sum(-1) + self.prior_of(ids_NT)

    def prior_of(self, ids_NT: Int[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        """The prior of the given tokens.

        `F.embedding`, as above: the backward pass of plain indexing adds up the gradients of equal
        tokens in an order that differs from run to run when there are several threads.
        """
        return F.embedding(ids_NT, self.prior_V[:, None])[..., 0]


class Auxiliary(nn.Module):
    """R, in one of its three kinds."""

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
        return TokenTable(
            tokens_VR=self.project_tokens(self.embeddings_VD),
            prior_V=self.prior_gain * self.prior_V + self.drift,
        )

    def table_of(self, ids_NT: Int[Tensor, "N T"]) -> tuple[TokenTable, Int[Tensor, "N T"]]:
        """The part of the table that some tokens need, and their places in it: far cheaper."""
        used_U, place_NT = ids_NT.unique(return_inverse=True)
        table = TokenTable(
            tokens_VR=self.project_tokens(self.embeddings_VD[used_U]),
            prior_V=self.prior_gain * self.prior_V[used_U] + self.drift,
        )
        return table, place_NT

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
                offset_NT = self.state(hidden_NTD)[..., 0]
                return Evidence(factors_NTR=self.evidence(hidden_NTD), offset_NT=offset_NT)
            case "additive":
                factors_NTR = self.evidence(hidden_NTD)
                evidence_NT = table.evidence(factors_NTR, ids_NT)
                root_N = self.root(hidden_NTD[:, 0])[..., 0]
                offset_NT = equations.additive_offsets(evidence_NT, mask_NT, root_N)
                return Evidence(factors_NTR=factors_NTR, offset_NT=offset_NT)
            case "transformer":
                prior_NT = table.prior_of(ids_NT)
                root_N = self.root(hidden_NTD[:, 0])[..., 0]
                so_far_NT = equations.additive_offsets(prior_NT, mask_NT, root_N)
                read_NTW = self.reader(hidden_NTD, so_far_NT - root_N[:, None])
                correction_NT = self.state(read_NTW)[..., 0] - self.state.bias
                return Evidence(
                    factors_NTR=self.evidence(read_NTW), offset_NT=so_far_NT + correction_NT
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
        return FrozenAuxiliary(
            copy, TokenTable(tokens_VR=table.tokens_VR.clone(), prior_V=table.prior_V.clone())
        )


class FrozenAuxiliary:
    """R as it was fitted; what the target, guided decoding and the run folder keep."""

    def __init__(self, module: Auxiliary, table: TokenTable) -> None:
        self._module = module
        self.table = table

    @property
    def kind(self) -> str:
        """`additive`, `transformer` or `head`."""
        return self._module.config.kind

    @property
    def hidden_size(self) -> int:
        """Width of the LLM's hidden states that it reads."""
        return self._module.root.in_features

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
        evidence: Evidence = self._module(self.table, hidden_NTD, ids_NT, mask_NT)
        return evidence

    @torch.no_grad()
    def satisfaction(self, rollouts: Rollouts) -> Float[Tensor, "N T"]:
        """R after each token of some completions."""
        evidence = self.read(rollouts)
        logits_NT = self.table.logits_of(evidence.factors_NTR, evidence.offset_NT, rollouts.ids_NT)
        return logits_NT.sigmoid()

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
            evidence: Evidence = self._module(self.table, hidden_BTD, ids_BT, mask_BT)
            u_BV = self.table.logits(evidence.factors_NTR[:, -1], evidence.offset_NT[:, -1])
            return strength * F.logsigmoid(u_BV)

        return log_satisfaction

    def save(self, folder: Path) -> None:
        """Write safetensors and a JSON file; self-contained."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self._module.state_dict()) | {"tokens_VR": self.table.tokens_VR}
        safetensors.torch.save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / _WEIGHTS
        )
        shape = {
            "auxiliary": self._module.config.model_dump(),
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
            return cls._from_tensors(shape, tensors)
        except (*_UNFIT, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{folder} holds no readable auxiliary: {error}") from error

    @classmethod
    def _from_tensors(
        cls, shape: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> "FrozenAuxiliary":
        tensors = dict(tensors)
        tokens_VR = tensors.pop("tokens_VR")
        config = AuxiliaryConfig.model_validate(shape["auxiliary"])
        no_embeddings = torch.zeros(1, shape["hidden_size"])
        module = Auxiliary(config, no_embeddings, tensors["prior_V"], seed=0)
        module.load_state_dict(tensors)
        module.to(tokens_VR.device).requires_grad_(requires_grad=False).eval()
        prior_V = module.prior_gain * module.prior_V + module.drift
        return cls(module, TokenTable(tokens_VR=tokens_VR, prior_V=prior_V))


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
