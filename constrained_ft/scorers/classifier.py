"""A text classifier in the format of transformers: any `AutoModelForSequenceClassification`."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification

from constrained_ft.errors import ScorerError
from constrained_ft.machine import CPU_PRODUCTS
from constrained_ft.scorer_config import ClassifierScorerConfig
from constrained_ft.scorers.pretrained import load_pretrained, version_of
from constrained_ft.scorers.protocol import Score, ScoreFailure


class ClassifierScorer:
    """The probability of some labels, or of none of them."""

    def __init__(self, config: ClassifierScorerConfig) -> None:
        """Load the classifier.

        Raises:
            ModelError: if it is missing or cannot be read.
            ScorerError: if it has no such label.
        """
        self._config = config
        self._tokenizer, self._model = load_pretrained(
            AutoModelForSequenceClassification,
            config.model_name_or_path,
            config.revision,
            dtype=getattr(torch, config.dtype),
            device=config.device,
        )
        # A tokenizer without marks of its own makes nothing of an empty text.
        self._nothing = "" if self._tokenizer("")["input_ids"] else "."
        self._places = self._label_places()
        shown = ", ".join(config.labels)
        self.name = f"hf {config.model_name_or_path} ({config.higher_is} by {shown})"
        settings = config.model_dump_json(exclude={"batch_size", "device", "model_name_or_path"})
        self.version = version_of(config.model_name_or_path, config.revision, settings)

    def _label_places(self) -> list[int]:
        known = {str(name): int(i) for i, name in (self._model.config.id2label or {}).items()}
        missing = [label for label in self._config.labels if label not in known]
        if missing or not self._config.labels:
            raise ScorerError(
                f"constraint.scorer.labels: {self._config.model_name_or_path} has the labels "
                f"{', '.join(known)}; got {list(self._config.labels)}"
            )
        return [known[label] for label in self._config.labels]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """P(labels), or 1 - P(labels)."""
        firsts, seconds = self._texts(prompts, completions)
        # Texts of similar length share a pass: less padding.
        order = sorted(range(len(firsts)), key=lambda i: len(firsts[i]) + len(completions[i]))
        found = [0.0] * len(firsts)
        for start in range(0, len(order), self._config.batch_size):
            rows = order[start : start + self._config.batch_size]
            inputs = self._tokenizer(
                [firsts[i] for i in rows],
                None if seconds is None else [seconds[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self._config.max_length,
                return_tensors="pt",
            ).to(self._model.device)
            with CPU_PRODUCTS:
                logits_BL = self._model(**inputs).logits.float()
            for i, probability in zip(rows, self._probabilities(logits_BL), strict=True):
                found[i] = probability
        satisfied = self._config.higher_is == "satisfied"
        return [Score(p if satisfied else 1.0 - p) for p in found]

    def _texts(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> tuple[list[str], list[str] | None]:
        completions = [completion or self._nothing for completion in completions]
        match self._config.text:
            case "completion":
                return completions, None
            case "prompt_and_completion":
                return [p + c for p, c in zip(prompts, completions, strict=True)], None
            case "pair":
                return list(prompts), completions

    def _probabilities(self, logits_BL: torch.Tensor) -> list[float]:
        single = logits_BL.shape[1] == 1
        if single or self._model.config.problem_type == "multi_label_classification":
            found_B = logits_BL.sigmoid()[:, self._places].max(-1).values
        else:
            found_B = logits_BL.softmax(-1)[:, self._places].sum(-1)
        return found_B.clamp(0, 1).tolist()
