"""Complete prompts by the base model of a run, the tuned one, and the tuned one guided by R."""

from collections.abc import Sequence
from dataclasses import dataclass

from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.config import SamplerConfig
from constrained_ft.decoding import Guide
from constrained_ft.distributed import StopRequest
from constrained_ft.llm import FrozenLLM
from constrained_ft.named_models import base_model, final_model, finished_run, scorers_of
from constrained_ft.progress import Display
from constrained_ft.prompts import check_prompt_lengths, tokenise_prompts
from constrained_ft.randomness import seed_for
from constrained_ft.sampling import sample
from constrained_ft.scorers import Scorer, least_scores

_SAMPLER = SamplerConfig(kind="cft", batch_size=64)


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One of those who answer."""

    name: str
    llm: FrozenLLM
    guide: Guide | None = None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one voice says to a prompt."""

    name: str
    texts: tuple[str, ...]
    scores: tuple[float | None, ...]
    """By the run's scorer; None where it says nothing."""

    @property
    def mean_score(self) -> float | None:
        """Of those that have a score."""
        known = [score for score in self.scores if score is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Everything that answers take, loaded once."""

    voices: tuple[Voice, ...]
    scorers: tuple[Scorer, ...]
    context_length: int | None
    max_new_tokens: int
    seed: int

    def answer(self, prompt: str, *, n: int, turn: int, display: Display) -> list[Answers]:
        """What each voice says, all with the same uniform numbers.

        Args:
            prompt: a text; each is answered on its own.
            n: answers of each voice.
            turn: with the seed and the prompt it keys the random numbers.
            display: what people watch.

        Raises:
            DataError: when the prompt is empty or too long.
        """
        prompts = tokenise_prompts([prompt], self.voices[0].llm.tokenizer)
        check_prompt_lengths(prompts, self.max_new_tokens, self.context_length)
        display.phase("answering", n * len(self.voices))
        texts = [
            sample(
                voice.llm,
                prompts,
                samples_per_prompt=n,
                max_new_tokens=self.max_new_tokens,
                sampler=_SAMPLER,
                seed=seed_for(self.seed, "chat", turn),
                iteration=0,
                display=display,
                stop=StopRequest(),
                guide=voice.guide,
            ).texts
            for voice in self.voices
        ]
        # One call: a scorer that waits for a server is waited for once.
        said = [text for of_voice in texts for text in of_voice]
        scores = least_scores(self.scorers, [prompt] * len(said), said)
        return [
            Answers(
                name=voice.name, texts=of_voice, scores=tuple(scores[place * n : (place + 1) * n])
            )
            for place, (voice, of_voice) in enumerate(zip(self.voices, texts, strict=True))
        ]


def load_chat(target: str, *, max_new_tokens: int | None, seed: int, display: Display) -> Chat:
    """Load a run's models, auxiliary and scorers.

    Args:
        target: a run folder.
        max_new_tokens: longest answer; None takes the run's own.
        seed: of all answers.
        display: what people watch.

    Raises:
        ConfigError: when the target is no finished run.
        ModelError: when a model is missing.
        CheckpointError: when the auxiliary cannot be read.
        ScorerError: when a scorer cannot be loaded.
    """
    run = finished_run(target, "cft chat")
    display.phase("loading", 1)
    scorers = scorers_of(run)
    tuned = final_model(run)
    llm = tuned.load()
    guide = FrozenAuxiliary.load(run.final_auxiliary, llm.device).guide()
    return Chat(
        voices=(
            Voice(name="base", llm=base_model(run).load()),
            Voice(name="tuned", llm=llm),
            Voice(name="guided", llm=llm, guide=guide),
        ),
        scorers=tuple(scorers),
        context_length=tuned.context_length(),
        max_new_tokens=max_new_tokens or run.config().prompts.max_new_tokens,
        seed=seed,
    )


def table(answers: Sequence[Answers]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people: a column a voice, scores in brackets, their mean last."""
    rows = [
        [f"{text} [{_score(score)}]" for text, score in row]
        for row in zip(*(zip(one.texts, one.scores, strict=True) for one in answers), strict=True)
    ]
    if len(rows) > 1:
        rows.append([f"mean score {_score(one.mean_score)}" for one in answers])
    return [one.name for one in answers], rows


def _score(score: float | None) -> str:
    return "no score" if score is None else f"{score:.2f}"
