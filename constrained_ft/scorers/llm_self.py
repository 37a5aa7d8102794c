"""A local LLM judges: it is asked whether the constraint holds, and answers yes or no."""

from collections.abc import Sequence

import torch

from constrained_ft.errors import ScorerError
from constrained_ft.loading import load_frozen, plain_config
from constrained_ft.machine import CPU_PRODUCTS
from constrained_ft.packing import pad_right
from constrained_ft.scorer_config import SelfJudgeScorerConfig
from constrained_ft.scorers.pretrained import version_of
from constrained_ft.scorers.protocol import Score, ScoreFailure


class SelfJudgeScorer:
    """P(yes) / (P(yes) + P(no)) as the next token after a question."""

    def __init__(self, config: SelfJudgeScorerConfig) -> None:
        """Load the LLM; training does not change this copy.

        Raises:
            ModelError: if it is missing.
            ScorerError: if its tokenizer does not tell the two answers apart.
        """
        self._config = config
        plain = plain_config(config.model_name_or_path)
        self._llm = load_frozen(
            plain.model_copy(update={"revision": config.revision}), precision="fp32"
        )
        self._yes, self._no = (
            self._first_token(config.answer_yes),
            self._first_token(config.answer_no),
        )
        if self._yes == self._no:
            raise ScorerError(
                f"constraint.scorer: answer_yes={config.answer_yes!r} and answer_no="
                f"{config.answer_no!r} begin with the same token of "
                f"{config.model_name_or_path}; choose answers that differ at once"
            )
        self.name = f"llm_self {config.model_name_or_path.partition('#')[0]}"
        settings = config.model_dump_json(exclude={"batch_size"})
        self.version = version_of(config.model_name_or_path, config.revision, settings)

    def _first_token(self, answer: str) -> int:
        ids = self._llm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ScorerError(f"constraint.scorer: the answer {answer!r} has no token")
        return int(ids[0])

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """The share of yes."""
        questions = [
            tuple(self._llm.tokenizer(self._question(*pair))["input_ids"])
            for pair in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        found = [0.0] * len(questions)
        for start in range(0, len(order), self._config.batch_size):
            rows = order[start : start + self._config.batch_size]
            ids_BL, lengths_B = pad_right([questions[i] for i in rows], 0, self._llm.device)
            with CPU_PRODUCTS:
                hidden_BLD = self._llm.hidden_states(ids_BL, lengths_B)
            last_BD = hidden_BLD[torch.arange(len(rows), device=ids_BL.device), lengths_B - 1]
            answers_B2 = self._llm.head(last_BD)[:, [self._yes, self._no]].float()
            for i, share in zip(rows, answers_B2.softmax(-1)[:, 0].tolist(), strict=True):
                found[i] = share
        return [Score(share) for share in found]

    def _question(self, prompt: str, completion: str) -> str:
        # Split first: a text that holds braces is no template.
        parts = self._config.template.split("{completion}")
        return completion.join(part.replace("{prompt}", prompt) for part in parts)
