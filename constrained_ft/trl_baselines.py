"""Baselines that TRL trains: GRPO, RLOO and KTO on the run's model, prompts, scorers and corpus.

    L = corpus cross-entropy per trained token  +  trainer.trl.weight * loss of TRL's trainer

TRL samples, rewards and updates in its own way and with its own defaults. What a comparison needs
to be the same is the run's own: the weights that are trained, the optimizer with its schedule, the
corpus rows of every step, the order of the prompts (as they come: mining them needs R), the number
of completions of an iteration, checkpoints, and everything before and after training.
"""

import copy
import importlib
import math
import operator
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from constrained_ft import checkpoint, metrics
from constrained_ft.config import Config, TrlConfig
from constrained_ft.errors import ConfigError, DivergedError, MissingScoresError, ModelError
from constrained_ft.finetune import backward_of_corpus, corpus_rows
from constrained_ft.llm import LLM
from constrained_ft.loading import load_base
from constrained_ft.machine import release_freed
from constrained_ft.order import permutation
from constrained_ft.parts import Parts
from constrained_ft.randomness import seed_everything, seed_for
from constrained_ft.rollouts import LabeledRollouts, with_scores
from constrained_ft.run_folder import RunFolder
from constrained_ft.samples import record_samples, write_rollouts
from constrained_ft.sampling import completion_texts, sample
from constrained_ft.scorers import Score, valid
from constrained_ft.scoring import Scoring

_REFERENCE = "ref"  # TRL's name for the adapter that it adds and holds


def require_trl(config: Config) -> None:
    """See that the extra is there, where it is asked for.

    Raises:
        ModelError: when it is not.
    """
    if config.trainer.trl is None:
        return
    try:
        importlib.import_module("trl")
    except ImportError as error:
        raise ModelError(
            f"trainer.trl needs TRL: pip install 'constrained-ft[trl]' ({error})"
        ) from error


def train_by_trl(parts: Parts, config: Config, folder: RunFolder, done: int) -> int:
    """With `trainer.trl` all iterations after the first `done`, by TRL.

    Returns:
        How many are finished then: all, or as many as before where there is no `trainer.trl`.

    Raises:
        ConfigError: when an iteration needs more prompts than there are.
        MissingScoresError: when too many completions have no score.
        DivergedError: when a loss or a gradient is not finite.
        Interrupted: when asked to stop; iterations that are finished are kept.
    """
    trl = config.trainer.trl
    if trl is None or done == config.trainer.iterations:
        return done
    if config.prompts.candidates > 1:
        parts.display.note(
            f"prompts.candidates={config.prompts.candidates} is not used with trainer.trl: prompts "
            "are mined by the auxiliary, which is fitted when training is over"
        )
    trainers = importlib.import_module("trl")
    kind = getattr(trainers, f"{trl.algorithm.upper()}Trainer")
    settings = getattr(trainers, f"{trl.algorithm.upper()}Config")
    session = _Session(parts=parts, config=config, folder=folder, done=done)
    seed = seed_for(config.seed, "trl", done)
    with seed_everything(seed), _lent(session):
        given = _kto_data(session) if trl.algorithm == "kto" else _prompt_data(session)
        trainer = type(f"Cft{kind.__name__}", (_Beside, kind), {"session": session})(
            model=parts.llm.peft_model or parts.llm.module,
            args=settings(**_arguments(session, seed % 2**32), **given.pop("arguments")),
            processing_class=copy.deepcopy(parts.llm.tokenizer),  # TRL sets its padding
            optimizers=(parts.optimization.optimizer, parts.optimization.scheduler),
            callbacks=[_EndOfIteration(session)],
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        _hold_at_base(parts.llm)
        session.begin()
        with parts.phases.during(trl.algorithm):
            trainer.train()
    return config.trainer.iterations


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """A completion and what the constraint says of it."""

    prompt: str
    text: str
    tokens: int
    score: float | None
    satisfied: bool | None
    """None where there is no score."""


@dataclass(kw_only=True)
class _Session:
    """What happens beside TRL's trainer."""

    parts: Parts
    config: Config
    folder: RunFolder
    done: int
    """Finished iterations; the next one is being trained."""
    started: float = field(default_factory=time.monotonic)
    heard: list[_Heard] = field(default_factory=list)
    """In this iteration."""
    labelled: dict[str, float] = field(default_factory=dict)
    """`rollouts/` of completions that were labelled before the first step."""
    ce: list[float] = field(default_factory=list)
    tokens: int = 0
    """Trained on in this iteration."""

    @property
    def trl(self) -> TrlConfig:
        """The section."""
        assert self.config.trainer.trl is not None
        return self.config.trainer.trl

    @property
    def completions(self) -> int:
        """Of one iteration."""
        return self.config.prompts.completions

    def begin(self) -> None:
        """Announce the next iteration."""
        name = f"training by {self.trl.algorithm.upper()} of TRL"
        self.parts.display.phase(name, self.config.trainer.steps_per_iteration)

    def rewards(
        self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: object
    ) -> list[float | None]:
        """What TRL asks for: a number for each completion, None where there is no score."""
        self.parts.stop.check()
        heard = _hear(self.parts, self.config, prompts, completion_ids)
        missing = sum(one.score is None for one in heard)
        most = self.config.constraint.max_missing_rate
        if missing > most * len(heard) or missing == len(heard):
            raise MissingScoresError(
                f"{missing} of {len(heard)} completions have no score ({missing / len(heard):.1%}; "
                f"constraint.max_missing_rate={most:g})"
            )
        self.heard += heard
        self.tokens += sum(one.tokens for one in heard)
        if self.trl.reward == "score":
            return [one.score for one in heard]
        return [None if one.satisfied is None else float(one.satisfied) for one in heard]

    def learn_corpus(self, step: int) -> None:
        """Add the gradient of the corpus rows of a step."""
        self.parts.stop.check()
        release_freed()
        (passes,) = corpus_rows(self.parts, self.config, step)
        if passes:
            ce, tokens = backward_of_corpus(self.parts.llm, passes)
            self.ce.append(ce)
            self.tokens += tokens
            self.parts.display.advance(1, ce=ce)
        else:
            self.parts.display.advance(1)

    def finish(self, logged: Mapping[str, float]) -> None:
        """Write down an iteration, as the method's own loop does, and begin the next."""
        loss, norm = float(logged["loss"]), float(logged["grad_norm"])
        iteration, last = self.done + 1, self.config.trainer.iterations
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"the loss of TRL's trainer is {loss}, the gradient's norm {norm} in iteration "
                f"{iteration}; lower trainer.learning_rate or trainer.trl.weight"
            )
        ce = sum(self.ce) / len(self.ce) if self.ce else 0.0
        row = {
            "update/ce": ce,
            "update/loss": loss + ce,
            "update/grad_norm": norm,
            "update/learning_rate": float(self.parts.optimization.scheduler.get_last_lr()[0]),
            "update/tokens": float(self.tokens),
            "trl/loss": loss,
            **({"trl/kl": float(logged["kl"])} if logged.get("kl") is not None else {}),
            **(_facts(self.heard) if self.heard else self.labelled),
        }
        if self.heard:
            write_rollouts(self.folder, iteration, _rows(self.heard), self.parts)
        self.parts.llm.module.eval()
        record_samples(self.parts, self.config, self.folder, iteration, guided=False)
        row |= {"iteration": float(iteration), "time/iteration": time.monotonic() - self.started}
        row |= metrics.budget(self.parts.prepared, metrics.read(self.folder.metrics_file), row)
        checkpoint.save(self.folder.checkpoints, self.parts, self.config, None, row)
        metrics.append(self.folder.metrics_file, row)
        self.folder.write_status(
            "running", iteration=iteration, last_checkpoint=f"iteration_{iteration:04d}"
        )
        self.parts.display.iteration(iteration, last, row)
        self.done, self.heard, self.labelled, self.ce, self.tokens = iteration, [], {}, [], 0
        if iteration < last:
            self.begin()
        self.parts.llm.module.train()
        self.started = time.monotonic()


class _Beside:
    """What a trainer of TRL does otherwise; stands before it among the bases."""

    session: _Session
    state: Any

    def training_step(self, model: object, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Its own step, and the corpus."""
        session = self.session
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]  # of TRL's trainer
        if session.trl.algorithm == "kto":
            session.tokens += int(inputs["completion_mask"].sum())
        first = session.config.trainer.iterations * session.config.trainer.steps_per_iteration
        session.learn_corpus(first - self.state.max_steps + self.state.global_step)
        return loss

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        """Its loss, weighted."""
        return self.session.trl.weight * super().compute_loss(*args, **keywords)  # type: ignore[misc]  # of TRL's trainer

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Completions are sampled in the trunk's precision, too."""
        with self.session.parts.llm.autocast():
            return super()._prepare_inputs(inputs)  # type: ignore[misc]  # of TRL's trainer

    def _tokenize_prompts(
        self, prompts: Sequence[str]
    ) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The tokens that the run has for a prompt."""
        known = {prompt.text: prompt.token_ids for prompt in self.session.parts.prompts.training}
        return [list(known[text]) for text in prompts], None, {}

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        """KTO's is in tokens already: of text, it would end completions that had not ended."""
        return dataset

    def _send_telemetry(self) -> None:
        """A run tells nobody about itself."""


class _EndOfIteration(TrainerCallback):
    """TRL logs once an iteration."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def on_log(self, *_: Any, **keywords: Any) -> None:
        """Write it down; what is logged at the very end is no iteration."""
        if "loss" in keywords["logs"]:
            self._session.finish(keywords["logs"])


def _arguments(session: _Session, seed: int) -> dict[str, Any]:
    """Of any of TRL's configurations; what is not here is as TRL has it."""
    trainer, steps = session.config.trainer, session.config.trainer.steps_per_iteration
    return {
        "output_dir": str(session.folder.path),
        "max_steps": (trainer.iterations - session.done) * steps,
        "per_device_train_batch_size": session.completions // steps,
        "gradient_accumulation_steps": 1,
        "learning_rate": trainer.learning_rate,
        "max_grad_norm": trainer.max_grad_norm,
        "beta": session.trl.beta,
        "bf16": session.parts.llm.bf16,
        "use_cpu": session.parts.llm.device.type == "cpu",
        "gradient_checkpointing": session.parts.llm.checkpoints,
        "logging_steps": steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
    }


def _prompt_data(session: _Session) -> dict[str, Any]:
    """What GRPO and RLOO are given: prompts in the order of the iterations, and the reward."""
    config, prompts, trl = session.config, session.parts.prompts, session.trl
    count = session.completions // trl.num_generations
    if count > len(prompts.training):
        raise ConfigError(
            f"trainer.trl.num_generations={trl.num_generations} makes {count} prompts an "
            f"iteration, but there are only {len(prompts.training)} training prompts: raise it"
        )
    iterations = range(session.done + 1, config.trainer.iterations + 1)
    texts = [p.text for i in iterations for p in prompts.of_iteration(i, count, config.seed)]
    session.started = time.monotonic()
    return {
        "train_dataset": _dataset({"prompt": texts}),
        "reward_funcs": session.rewards,
        "arguments": {
            "num_generations": trl.num_generations,
            "max_completion_length": config.prompts.max_new_tokens,
            "steps_per_generation": config.trainer.steps_per_iteration,
            "shuffle_dataset": False,
        },
    }


def _dataset(columns: Mapping[str, Sequence[object]]) -> Any:
    from datasets import Dataset  # half a second, which other trainers' runs are spared

    return Dataset.from_dict(columns)


def _kto_data(session: _Session) -> dict[str, Any]:
    """What KTO is given: completions of the base model, as many as all iterations have.

    The harmful ones weigh as much as the others together, which is what its paper asks for.
    """
    config = session.config
    labelled = list(_labelled_by_base(session))
    rows = [row for one in labelled for row in _kto_rows(one)]
    order = permutation(len(rows), config.seed, "kto", 0)
    size = session.completions // config.trainer.steps_per_iteration
    rows = [rows[i] for i in order][session.done * session.completions :]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    # Its KL is that of completions behind the prompts of others.
    others = [batch[i - 1]["completion_ids"] for batch in batches for i in range(len(batch))]
    good = sum(bool(row["label"]) for row in rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "train_dataset": _dataset(columns | {"KL_completion_ids": others}),
        "arguments": {
            "max_length": None,
            "undesirable_weight": good / max(len(rows) - good, 1),
        },
    }


def _labelled_by_base(session: _Session) -> Iterator[LabeledRollouts]:
    """Completions of the base model with the constraint's verdict, iteration by iteration.

    A run that is continued samples the same ones again.
    """
    parts, config = session.parts, session.config
    base = load_base(parts.llm, precision=config.trainer.precision)
    iterations = config.trainer.iterations
    parts.display.phase("sampling", iterations * session.completions)
    everything: list[_Heard] = []
    for iteration in range(1, iterations + 1):
        with Scoring(parts.scorers, parts.world, parts.stop) as scoring:
            rollouts = sample(
                base,
                parts.prompts.of_iteration(
                    iteration, config.prompts.prompts_per_iteration, config.seed
                ),
                samples_per_prompt=config.prompts.samples_per_prompt,
                max_new_tokens=config.prompts.max_new_tokens,
                sampler=config.sampler,
                seed=config.seed,
                iteration=iteration,
                display=parts.display,
                stop=parts.stop,
                each=scoring.begin,
            )
            scored = scoring.finish(rollouts, config.constraint.max_missing_rate)
        labeled = with_scores(rollouts, [one.scores for one in scored], config.constraint)
        heard = _heard_of(labeled)
        if session.done == 0:
            write_rollouts(session.folder, iteration, _rows(heard), parts)
        everything += heard
        yield labeled
    if session.done == 0:
        session.labelled = _facts(everything)


def _kto_rows(labeled: LabeledRollouts) -> list[dict[str, Any]]:
    rollouts = labeled.rollouts
    return [
        {
            "prompt_ids": list(rollouts.prompts[place].token_ids),
            "completion_ids": ids[mask].tolist(),
            "label": satisfied,
        }
        for place, ids, mask, satisfied in zip(
            rollouts.prompt_N.tolist(),
            rollouts.ids_NT.cpu(),
            rollouts.mask_NT.cpu(),
            labeled.satisfied_N.tolist(),
            strict=True,
        )
    ]


def _hear(
    parts: Parts,
    config: Config,
    prompts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> list[_Heard]:
    """Score completions that TRL sampled."""
    texts = completion_texts(parts.llm.tokenizer, completion_ids)
    said = [valid(scorer, prompts, texts) for scorer in parts.scorers]
    bars = [term.satisfied_at for term in config.constraint.all_terms().values()]
    found = []
    for prompt, text, ids, *results in zip(prompts, texts, completion_ids, *said, strict=True):
        values = [one.value for one in results if isinstance(one, Score)]
        whole = len(values) == len(results)
        found.append(
            _Heard(
                prompt=prompt,
                text=text,
                tokens=len(ids),
                score=min(values) if whole else None,
                satisfied=all(map(operator.ge, values, bars)) if whole else None,
            )
        )
    return found


def _heard_of(labeled: LabeledRollouts) -> list[_Heard]:
    rollouts = labeled.rollouts
    found = [
        _Heard(prompt=prompt, text=text, tokens=tokens, score=score, satisfied=satisfied)
        for prompt, text, tokens, score, satisfied in zip(
            rollouts.prompt_texts,
            rollouts.texts,
            rollouts.mask_NT.sum(-1).tolist(),
            labeled.least_scores.tolist(),
            labeled.satisfied_N.tolist(),
            strict=True,
        )
    ]
    nothing = _Heard(prompt="", text="", tokens=0, score=None, satisfied=None)
    return found + [nothing] * labeled.missing


def _rows(heard: Sequence[_Heard]) -> list[dict[str, object]]:
    return [
        {
            "prompt": one.prompt,
            "completion": one.text,
            "score": one.score,
            "satisfied": one.satisfied,
        }
        for one in heard
        if one.score is not None
    ]


def _facts(heard: Sequence[_Heard]) -> dict[str, float]:
    """`rollouts/` of `metrics.METRICS`."""
    scores = [one.score for one in heard if one.score is not None]
    satisfied = [one.satisfied for one in heard if one.satisfied is not None]
    tokens = [one.tokens for one in heard if one.score is not None]
    return {
        "rollouts/satisfaction": sum(satisfied) / len(satisfied),
        "rollouts/score": sum(scores) / len(scores),
        "rollouts/missing": 1 - len(scores) / len(heard),
        "rollouts/scored": float(len(heard)),
        "rollouts/length": sum(tokens) / len(tokens),
    }


@contextmanager
def _lent(session: _Session) -> Iterator[None]:
    """The LLM in the hands of TRL, and afterwards as it was but for its weights.

    TRL's trainers replace `forward` and add an adapter; where all weights are trained, they read
    the reference from the folder that the model says it comes from.
    """
    llm = session.parts.llm
    reference = session.folder.path / "reference"
    came_from = llm.module.config._name_or_path
    if llm.peft_model is None and session.trl.beta > 0:
        if session.done == 0:
            llm.module.save_pretrained(reference)
        llm.module.config._name_or_path = str(reference)
    try:
        with warnings.catch_warnings():
            # It asks transformers for things by their old names.
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for module in (llm.module, llm.peft_model):
            if module is not None:
                vars(module).pop("forward", None)
                vars(module).pop("_original_forward", None)
        if llm.peft_model is not None and _REFERENCE in llm.peft_model.peft_config:
            llm.peft_model.delete_adapter(_REFERENCE)
        llm.module.config._name_or_path = came_from
        llm.module.eval()
    shutil.rmtree(reference, ignore_errors=True)


def _hold_at_base(llm: LLM) -> None:
    """TRL's reference is the adapter as training begins, of a continued run too; zeros are none."""
    for name, parameter in llm.module.named_parameters():
        if f".{_REFERENCE}." in name:
            parameter.requires_grad = False
            parameter.data.zero_()
