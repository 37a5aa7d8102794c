"""Answer a prompt by base, tuned and guided model at once, token by token, and read what was said.

Guided samples come from q ∝ p R^strength: the tuned model at 0, the target q* at 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, StringConstraints

from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.decoding import decode_token_by_token
from constrained_ft.explain import ExplainedRun, Word, explain_tokens, meaning, words_of
from constrained_ft.llm import FrozenLLM
from constrained_ft.named_models import base_model, final_model, finished_run, scorers_of
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt, check_prompt_lengths, tokenise_prompts
from constrained_ft.randomness import generator_for, seed_for
from constrained_ft.scorers import Scorer, least_scores
from constrained_ft.section import Section

LONGEST_PROMPT = 4_000  # characters
MOST_NEW_TOKENS = 256
STRONGEST = 4.0
_ALTERNATIVES = 4  # of p and of q, listed for a token

Voice = Literal["base", "tuned", "guided"]
VOICES: tuple[Voice, ...] = ("base", "tuned", "guided")


class Question(Section):
    """What is asked, within limits."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_PROMPT)]
    """A text, completed on its own."""
    voices: Annotated[tuple[Voice, ...], Field(min_length=1, max_length=len(VOICES))] = VOICES
    """Who answers."""
    strength: Annotated[float, Field(ge=0.0, le=STRONGEST, allow_inf_nan=False)] = 1.0
    """Of the guidance."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)]
    """Longest answer."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the uniform numbers, which all voices share."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one voice has just said."""

    voice: Voice
    text: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that one voice has said."""

    voice: Voice
    words: tuple[Word, ...]
    satisfaction: float | None
    """R before the first word; None where nothing was said."""
    score: float | None
    """By the run's scorer; None where it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """Everything that answers take, loaded once."""

    run: ExplainedRun
    """What is known of it beforehand; it has no texts."""
    base: FrozenLLM
    tuned: FrozenLLM
    auxiliary: FrozenAuxiliary
    scorers: tuple[Scorer, ...]
    context_length: int | None
    max_new_tokens: int
    """The run's own, within the limit."""

    def answer(self, question: Question) -> Iterator[Piece | Answer]:
        """All voices in turn, a token each; the answer of a voice is the last of it.

        The same uniform numbers as `cft generate --seed`, so the same texts: the guided ones at
        strength 1.

        Raises:
            DataError: when the prompt is empty or too long.
        """
        (prompt,) = tokenise_prompts([question.prompt], self.tuned.tokenizer)
        check_prompt_lengths([prompt], question.max_new_tokens, self.context_length)
        speaking = [self._speak(voice, prompt, question) for voice in question.voices]
        while speaking:
            for one in list(speaking):
                said = next(one, None)
                if said is None:
                    speaking.remove(one)
                else:
                    yield said

    def _speak(self, voice: Voice, prompt: Prompt, question: Question) -> Iterator[Piece | Answer]:
        llm = self.base if voice == "base" else self.tuned
        generator = generator_for(seed_for(question.seed, "generate"), "rollouts", 0, prompt.id)
        uniforms_BT = torch.rand(
            1, question.max_new_tokens, generator=generator, dtype=torch.float64
        ).to(llm.device)
        guide = self.auxiliary.guide(question.strength) if voice == "guided" else None
        end = llm.tokenizer.eos_token_id
        ids: list[int] = []
        text = shown = ""
        for said in decode_token_by_token(llm, [prompt.token_ids], uniforms_BT, guide=guide):
            ids = said.ids_BT[0].tolist()
            if ids[-1] == end:
                ids.pop()
            text = str(llm.tokenizer.decode(ids))
            # A character of several tokens is shown when it is whole.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield Piece(voice=voice, text=text.removeprefix(shown))
                shown = text
        (score,) = least_scores(self.scorers, [prompt.text], [text])
        if not ids:
            yield Answer(voice=voice, words=(), satisfaction=None, score=score)
            return
        # R belongs to the tuned model; what others say is read with it too.
        start, tokens = explain_tokens(
            self.tuned, self.auxiliary, prompt.token_ids, ids, _ALTERNATIVES
        )
        yield Answer(voice=voice, words=words_of(tokens), satisfaction=start, score=score)


def load_explorer(target: str, display: Display) -> Explorer:
    """Load a run's models, auxiliary and scorers.

    Args:
        target: a run folder.
        display: what people watch.

    Raises:
        ConfigError: when the target is no finished run.
        ModelError: when a model is missing.
        CheckpointError: when the auxiliary cannot be read.
        ScorerError: when a scorer cannot be loaded.
    """
    run = finished_run(target, "cft serve")
    display.phase("loading", 1)
    config, scorers, tuned = run.config(), scorers_of(run), final_model(run)
    llm = tuned.load()
    auxiliary = FrozenAuxiliary.load(run.final_auxiliary, llm.device)
    about = ExplainedRun(
        name=run.path.name,
        auxiliary=auxiliary.kind,
        constraint=" and ".join(scorer.name for scorer in scorers),
        meaning=meaning(config),
        texts=(),
    )
    return Explorer(
        run=about,
        base=base_model(run).load(),
        tuned=llm,
        auxiliary=auxiliary,
        scorers=tuple(scorers),
        context_length=tuned.context_length(),
        max_new_tokens=min(config.prompts.max_new_tokens, MOST_NEW_TOKENS),
    )
