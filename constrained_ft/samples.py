"""What the LLM says, on disk: every scored rollout, and a few prompts now and then."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from constrained_ft import evaluate
from constrained_ft.config import Config
from constrained_ft.decoding import Guide
from constrained_ft.llm import FrozenLLM
from constrained_ft.parts import Parts
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import seed_for
from constrained_ft.rollouts import LabeledRollouts, Rollouts
from constrained_ft.run_folder import RunFolder
from constrained_ft.sampling import sample
from constrained_ft.scorer_config import is_quick
from constrained_ft.scorers import least_scores
from constrained_ft.target import Target

_PROMPTS = 2  # of each group
_MOST_FILES = 8  # of a run, about: four completions take as long as an optimizer step


def record_base(parts: Parts, config: Config, folder: RunFolder) -> None:
    """What the base model says to the fixed prompts: the file of iteration 0."""
    file = folder.samples_file(0)
    if not file.exists():
        prompts = _fixed_prompts(parts)
        texts = _complete(parts, config, parts.llm.frozen(), prompts, None)
        _write_rows(file, _rows(parts, prompts, {"base": texts}))


def record_iteration(
    parts: Parts, config: Config, folder: RunFolder, target: Target, iteration: int
) -> dict[str, float]:
    """The iteration's rollouts, and some 8 times a run what the LLM says to the fixed prompts.

    Returns:
        `judge/...` of `metrics.METRICS`: what quick judges say of the rollouts. Training does not
        see it; where it parts from the training scorer, the scorer is being gamed.
    """
    judged: dict[str, float] = {}
    if target.iteration == iteration:
        write_rollouts(folder, iteration, _rollout_rows(parts.replay[0]), parts)
        judged = _ask_judges(parts, config, parts.replay[0].unguided.rollouts)
    record_samples(parts, config, folder, iteration, guided=True)
    return judged


def record_samples(
    parts: Parts, config: Config, folder: RunFolder, iteration: int, *, guided: bool
) -> None:
    """Some 8 times a run what the LLM says to the fixed prompts, alone and guided by R."""
    last = config.trainer.iterations
    if iteration % -(-last // _MOST_FILES) == 0 or iteration == last:
        _record_fixed_prompts(parts, config, folder, iteration, guided=guided)


def _ask_judges(parts: Parts, config: Config, rollouts: Rollouts) -> dict[str, float]:
    """The share that satisfies each judge, of the rollouts to which it gives a score."""
    found = {}
    for name, judge in config.evaluation.all_judges().items():
        if not is_quick(judge.scorer):
            continue
        said = least_scores([parts.judges[name]], rollouts.prompt_texts, rollouts.texts)
        scores = [score for score in said if score is not None]
        if scores:
            satisfied = sum(score >= judge.satisfied_at for score in scores)
            found[f"judge/{name}/satisfaction"] = satisfied / len(scores)
    return found


def _record_fixed_prompts(
    parts: Parts, config: Config, folder: RunFolder, iteration: int, *, guided: bool
) -> None:
    prompts = _fixed_prompts(parts)
    base = [json.loads(line)["base"] for line in folder.samples_file(0).read_text().splitlines()]
    now = parts.llm.frozen()
    said = {"base": base, "tuned": _complete(parts, config, now, prompts, None)}
    if guided:
        guide = parts.auxiliary.frozen().guide()
        said["guided"] = _complete(parts, config, now, prompts, guide)
    rows = _rows(parts, prompts, said)
    _write_rows(folder.samples_file(iteration), rows)
    for row in rows:
        scores = row["scores"]
        assert isinstance(scores, dict)
        parts.display.sample(
            str(row["prompt"]), str(row["base"]), str(row["tuned"]), scores["tuned"]
        )


def _fixed_prompts(parts: Parts) -> list[Prompt]:
    return evaluate.choose_prompts(parts.prompts.held_out, _PROMPTS)


def _complete(
    parts: Parts, config: Config, llm: FrozenLLM, prompts: Sequence[Prompt], guide: Guide | None
) -> list[str]:
    """One completion of each prompt; the same uniform numbers whoever completes."""
    rollouts = sample(
        llm,
        prompts,
        samples_per_prompt=1,
        max_new_tokens=config.prompts.max_new_tokens,
        sampler=config.sampler,
        seed=seed_for(config.seed, "fixed prompts"),
        iteration=0,
        display=Silent(),
        stop=parts.stop,
        guide=guide,
    )
    return list(rollouts.texts)


def _rows(
    parts: Parts, prompts: Sequence[Prompt], texts: Mapping[str, Sequence[str]]
) -> list[dict[str, object]]:
    # One call: a scorer that waits for a server is waited for once.
    questions = [prompt.text for prompt in prompts] * len(texts)
    asked = [text for said in texts.values() for text in said]
    found = least_scores(parts.scorers, questions, asked)
    count = len(prompts)
    scores = {name: found[i * count : (i + 1) * count] for i, name in enumerate(texts)}
    return [
        {"prompt": prompt.text, "group": prompt.group}
        | {name: said[i] for name, said in texts.items()}
        | {"scores": {name: values[i] for name, values in scores.items()}}
        for i, prompt in enumerate(prompts)
    ]


def write_rollouts(
    folder: RunFolder, iteration: int, rows: Sequence[Mapping[str, object]], parts: Parts
) -> None:
    """The scored completions of an iteration: `prompt`, `completion`, `score`, `satisfied`."""
    version = " + ".join(scorer.version for scorer in parts.scorers)
    known = {"llm_iteration": iteration, "scorer_version": version}
    _write_rows(folder.rollouts_file(iteration), [{**row, **known} for row in rows])


def _rollout_rows(labeled: LabeledRollouts) -> list[dict[str, object]]:
    rollouts = labeled.rollouts
    by = {"sampled_by": rollouts.sampled_by}
    return [
        {
            "prompt": prompt,
            "completion": text,
            "score": score,
            "satisfied": satisfied,
            "guided_tokens": guided,
        }
        | by
        for prompt, text, score, satisfied, guided in zip(
            rollouts.prompt_texts,
            rollouts.texts,
            labeled.least_scores.tolist(),
            labeled.satisfied_N.tolist(),
            rollouts.guided_N.tolist(),
            strict=True,
        )
    ]


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
