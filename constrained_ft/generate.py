"""Complete prompts with a run's model or any other, with or without the auxiliary's guidance."""

from collections.abc import Sequence

from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.config import SamplerConfig
from constrained_ft.decoding import Guide
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ConfigError
from constrained_ft.named_models import final_model, find_run, model_at, scorers_of
from constrained_ft.progress import Display
from constrained_ft.prompts import check_prompt_lengths, tokenise_prompts
from constrained_ft.randomness import seed_for
from constrained_ft.sampling import sample
from constrained_ft.scorers import least_scores

_NEW_TOKENS = 64  # of a model that is no run
_SAMPLER = SamplerConfig(kind="cft", batch_size=64)


def generate_command(  # noqa: PLR0913
    target: str,
    *,
    prompts: Sequence[str],
    n: int,
    guided: bool,
    max_new_tokens: int | None,
    seed: int,
    display: Display,
) -> list[dict[str, object]]:
    """Sample completions at temperature 1.

    Args:
        target: a run folder, a model folder or a hub id.
        prompts: texts; equal ones count once.
        n: completions of each.
        guided: add log R of the run's auxiliary to the log-probability of every token.
        max_new_tokens: longest completion; None takes the run's own, or 64.
        seed: of the samples.
        display: what people watch.

    Returns:
        A row for each completion: `prompt`, `completion` and, for a run, `score`.

    Raises:
        ConfigError: when guidance is asked of a model without an auxiliary, or the run is not
            finished.
        DataError: when a prompt is empty or too long.
        ModelError: when the model is missing.
    """
    run = find_run(target)
    if run is None and guided:
        raise ConfigError(
            f"--guided needs the auxiliary of a run, and {target} is not a run folder; give the "
            "folder that `cft train` wrote (the one that holds config.yaml), or leave --guided out"
        )
    if max_new_tokens is None:
        max_new_tokens = _NEW_TOKENS if run is None else run.config().prompts.max_new_tokens
    display.phase("loading", 1)
    source = model_at(target) if run is None else final_model(run)
    llm = source.load()
    tokenised = tokenise_prompts(prompts, llm.tokenizer)
    check_prompt_lengths(tokenised, max_new_tokens, source.context_length())
    guide: Guide | None = None
    if run is not None and guided:
        guide = FrozenAuxiliary.load(run.final_auxiliary, llm.device).guide()
    display.phase("sampling", len(tokenised) * n)
    rollouts = sample(
        llm,
        tokenised,
        samples_per_prompt=n,
        max_new_tokens=max_new_tokens,
        sampler=_SAMPLER,
        seed=seed_for(seed, "generate"),
        iteration=0,
        display=display,
        stop=StopRequest(),
        guide=guide,
    )
    rows: list[dict[str, object]] = [
        {"prompt": prompt, "completion": text}
        for prompt, text in zip(rollouts.prompt_texts, rollouts.texts, strict=True)
    ]
    if run is None:
        return rows
    scores = least_scores(scorers_of(run), rollouts.prompt_texts, rollouts.texts)
    return [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
