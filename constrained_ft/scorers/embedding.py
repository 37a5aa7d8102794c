"""Nearness to example sentences, or a linear probe, on sentence embeddings.

Shape suffixes:  N texts, L token positions, D width, R references.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel

from constrained_ft.errors import ScorerError
from constrained_ft.machine import CPU_PRODUCTS
from constrained_ft.scorer_config import EmbeddingScorerConfig
from constrained_ft.scorers.pretrained import load_pretrained, version_of
from constrained_ft.scorers.protocol import Score, ScoreFailure

_WEIGHTS, _FACTS = "probe.safetensors", "probe.json"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """P(class 1 | text) = sigmoid(weight . embedding + bias)."""

    weight_D: Float[Tensor, " D"]
    bias: float
    embedding: EmbeddingScorerConfig
    """The embedding model and how it is read."""
    facts: dict[str, float]
    """How good it is on held-out rows."""

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON.

        Raises:
            ScorerError: if they cannot be written.
        """
        keys = {"model_name_or_path", "revision", "pooling", "max_length"}
        tree = self.embedding.model_dump(include=keys) | {"held_out": self.facts}
        tensors = {"weight": self.weight_D.contiguous(), "bias": torch.tensor([self.bias])}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, folder / _WEIGHTS)
            (folder / _FACTS).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ScorerError(f"cannot write the probe to {folder}: {error}") from error

    @classmethod
    def load(cls, folder: Path, config: EmbeddingScorerConfig) -> "Probe":
        """Read what `save` wrote; the device and the batch are those of `config`.

        Raises:
            ScorerError: if the folder holds no probe.
        """
        try:
            tree = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            facts = tree.pop("held_out")
            tensors = safetensors.torch.load_file(folder / _WEIGHTS)
            embedding = config.model_copy(update=tree)
            return cls(
                weight_D=tensors["weight"],
                bias=float(tensors["bias"]),
                embedding=embedding,
                facts=facts,
            )
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise ScorerError(
                f"constraint.scorer.probe={folder} holds no probe ({type(error).__name__}: "
                f"{error}); `cft score fit` writes one"
            ) from error


class Embedder:
    """Unit vectors of texts."""

    def __init__(self, config: EmbeddingScorerConfig) -> None:
        """Load the embedding model.

        Raises:
            ModelError: if it is missing or cannot be read.
        """
        self._config = config
        assert config.model_name_or_path is not None
        self._tokenizer, self._model = load_pretrained(
            AutoModel,
            config.model_name_or_path,
            config.revision,
            dtype=torch.float32,
            device=config.device,
        )
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"
        settings = f"{config.pooling} {config.max_length}"
        self.version = version_of(config.model_name_or_path, config.revision, settings)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """One vector of length 1 for each text, on the CPU."""
        # An empty text has no tokens in some tokenizers, and a mean over none is no number.
        shown = [text if text.strip() else "." for text in texts]
        order = sorted(range(len(shown)), key=lambda i: len(shown[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), self._config.batch_size):
            rows = order[start : start + self._config.batch_size]
            inputs = self._tokenizer(
                [shown[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self._config.max_length,
                return_tensors="pt",
            ).to(self._model.device)
            with CPU_PRODUCTS:
                states_NLD = self._model(**inputs).last_hidden_state.float()
            pooled_ND = self._pooled(states_NLD, inputs["attention_mask"])
            for i, vector_D in zip(rows, F.normalize(pooled_ND, dim=-1).cpu(), strict=True):
                found[i] = vector_D
        return torch.stack([found[i] for i in range(len(shown))])

    def _pooled(self, states_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        match self._config.pooling:
            case "first":
                return states_NLD[:, 0]
            case "last":
                rows = torch.arange(len(states_NLD), device=states_NLD.device)
                return states_NLD[rows, mask_NL.sum(-1) - 1]
            case "mean":
                weights_NL = mask_NL.float()
                sums_ND = (states_NLD * weights_NL[..., None]).sum(1)
                return sums_ND / weights_NL.sum(1, keepdim=True)


class EmbeddingScorer:
    """The nearest of some example sentences, or a probe."""

    def __init__(self, config: EmbeddingScorerConfig) -> None:
        """Load the embedding model, and the probe or the examples.

        Raises:
            ModelError: if the model is missing.
            ScorerError: if the probe is.
        """
        self._satisfied = config.higher_is == "satisfied"
        probe = None
        if config.probe is not None:
            probe = Probe.load(Path(config.probe).expanduser(), config)
            config = probe.embedding
        self._probe = probe
        self._embed = Embedder(config)
        examples = json.dumps(config.references)
        if probe is None:
            self._references_RD = self._embed(config.references)
            self.name = f"embedding (near {len(config.references)} examples)"
        else:
            examples = f"{probe.weight_D.tolist()} {probe.bias}"
            self.name = f"embedding (probe {config.probe})"
        told = f"{self._embed.version} {config.higher_is} {examples}"
        self.version = hashlib.sha256(told.encode()).hexdigest()[:16]

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """The largest cosine similarity, or the probe's probability."""
        if not completions:
            return []
        found_ND = self._embed(completions)
        if self._probe is None:
            value_N = (found_ND @ self._references_RD.T).max(-1).values.clamp(0, 1)
        else:
            value_N = (found_ND @ self._probe.weight_D + self._probe.bias).sigmoid()
        return [Score(v if self._satisfied else 1.0 - v) for v in value_N.tolist()]
