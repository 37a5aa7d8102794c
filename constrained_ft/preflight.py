"""The last look before training: the base model measured, and one panel of what will happen."""

from constrained_ft import checkpoint, evaluate, results
from constrained_ft.config import Config
from constrained_ft.distributed import pack, unpack
from constrained_ft.errors import MissingScoresError, SamplerError, SamplingError, ScorerError
from constrained_ft.llm import FrozenLLM
from constrained_ft.loading import rehearse_export
from constrained_ft.machine import release_freed
from constrained_ft.memory import (
    estimate_memory,
    forget_peak,
    held_memory,
    memory_words,
    recent_peak,
)
from constrained_ft.parts import Parts
from constrained_ft.progress import Silent
from constrained_ft.regimes import advice, base_rate, is_graded
from constrained_ft.results import Evaluation
from constrained_ft.run_folder import RunFolder
from constrained_ft.samples import record_base
from constrained_ft.sampling import sample

_REHEARSED = 32  # tokens that the exported model is tried out on
_SAMPLED = 2  # prompts that a sampling server is tried out on


def look_before(parts: Parts, config: Config, folder: RunFolder) -> Evaluation:
    """Measure the base model and announce the run.

    Raises:
        ScorerError: when the base satisfies the constraint always or never: nothing to learn from.
    """
    device = parts.llm.device
    watched, held = forget_peak(device), held_memory(device) or 0
    base = _evaluate_base(parts, config, folder)
    taken = recent_peak(device) - held if watched else 0
    parts.memory_estimate = estimate_memory(parts.llm, parts.prompts, config, taken, parts.world)
    _announce(parts, config, folder, base)
    with parts.llm.gathered():
        if parts.everyone.leads:
            record_base(parts, config, folder)
    return base


def rehearse(parts: Parts, config: Config, folder: RunFolder) -> None:
    """Save, export and read both back before the first step: what fails then, fails now.

    Raises:
        CheckpointError: when what is written cannot be read back.
        SamplerError: when the sampling server does not sample from the LLM.
    """
    if not (parts.everyone.leads or parts.llm.is_sharded):
        return
    parts.display.phase("rehearsing the checkpoint and the export", 1)
    release_freed()  # what the rehearsal of an update took is more than an export takes
    with parts.phases.during("rehearsal"):
        saved = checkpoint.save(folder.checkpoints, parts, config, None, {"iteration": 0.0})
        checkpoint.restore(saved, parts, config)
        text = parts.corpus.training[0].token_ids[:_REHEARSED]
        with parts.llm.gathered():
            if parts.everyone.leads:
                rehearse_export(parts.llm, folder.rehearsal, text)
                _rehearse_sampling(parts, config)
    parts.display.advance()


def _rehearse_sampling(parts: Parts, config: Config) -> None:
    """Have the sampling server load the adapter and complete some prompts."""
    if parts.server is None:
        return
    try:
        sample(
            parts.llm.frozen(),
            parts.prompts.training[:_SAMPLED],
            samples_per_prompt=config.prompts.samples_per_prompt,
            max_new_tokens=config.prompts.max_new_tokens,
            sampler=config.sampler,
            seed=config.seed,
            iteration=1,
            display=Silent(),
            stop=parts.stop,
            server=parts.server,
        )
    except SamplingError as error:
        raise SamplerError(f"before training: {error}") from error


def _evaluate_base(parts: Parts, config: Config, folder: RunFolder) -> Evaluation:
    """The model before training; measured once, read back when a run is resumed."""
    # The first rank looks, so that all do the same.
    _, measured = unpack(parts.everyone.tell(pack({}, folder.evaluation_file.exists())))
    if measured:
        return results.load(folder.evaluation_file)[0]
    try:
        base = evaluate_held_out(parts, config, parts.llm.frozen(), "base", base=None)
    except MissingScoresError as error:
        raise ScorerError(f"before training: {error}") from error
    if parts.everyone.leads:
        results.save(folder.evaluation_file, [base], config)
    return base


def evaluate_held_out(
    parts: Parts, config: Config, llm: FrozenLLM, name: str, base: FrozenLLM | None
) -> Evaluation:
    """Measure a model on the run's held-out prompts and text."""
    prompts = evaluate.choose_prompts(parts.prompts.held_out, config.evaluation.max_prompts)
    total = len(prompts) * config.evaluation.samples_per_prompt
    parts.display.phase(f"evaluating the {name} model", total)
    return evaluate.evaluate(
        llm,
        prompts,
        parts.corpus.validation,
        parts.scorers,
        parts.judges,
        config,
        model=name,
        base=base,
        questions=parts.questions,
        display=parts.display,
        stop=parts.stop,
        world=parts.everyone,
    )


def _announce(parts: Parts, config: Config, folder: RunFolder, base: Evaluation) -> None:
    """One panel before training; refuses a constraint that the base always or never satisfies."""
    rate, samples = base_rate(base)
    annealed = any(t.anneal is not None for t in config.constraint.all_terms().values())
    hopeless = rate in (0.0, 1.0) and not (rate == 0.0 and annealed and is_graded(base))
    if not config.trainer.is_plain and hopeless:
        said = advice(base, config)
        raise ScorerError(
            f"the base model satisfies the constraint in {round(rate * samples)} of {samples} "
            "probe samples, so there is nothing to learn from; change constraint.satisfied_at "
            f"({'raise' if rate == 1 else 'lower'} it), constraint.scorer or the prompts"
            + (f" ({said})" if said and "proposal" in said else "")
        )
    trained = sum(p.numel() for p in parts.llm.trained_parameters().values())
    everything = sum(p.numel() for p in parts.llm.module.parameters())
    stats, trainer = parts.corpus.stats, config.trainer
    parts.display.panel(
        config.name,
        {
            "model": f"{config.llm.model_name_or_path.partition('#')[0]}, "
            f"{everything:,} parameters",
            "trained": f"{trained:,} parameters ({'LoRA' if config.llm.lora else 'all weights'})",
            "corpus": f"{stats.rows:,} rows, {stats.tokens:,} tokens, longest {stats.longest}, "
            f"{stats.truncated_rows} cut",
            "prompts": f"{len(parts.prompts.training)} to train, "
            f"{len(parts.prompts.held_out)} held out, "
            f"{trainer.iterations} x {config.prompts.prompts_per_iteration} x "
            f"{config.prompts.samples_per_prompt} rollouts",
            "steps": f"{trainer.iterations} iterations x {trainer.steps_per_iteration}, "
            + trainer.pull_words(parts.kl_weight),
            "constraint": _constraint_words(parts, config),
            "base satisfies": f"{rate:.1%} of {samples} probe samples{_terms_words(base)}",
            **({"scoring": _scoring_words(config, base)} if base.seconds_per_score else {}),
            "schedule": f"{trainer.schedule}, {_placement_words(parts, config)}",
            "memory": memory_words(parts.llm, parts.memory_estimate),
            "folder": str(folder.path),
        },
    )
    said = advice(base, config)
    if said is not None:
        parts.display.note(said)
    if not parts.everyone.leads:
        return
    folder.add_environment(
        {
            "processes": parts.everyone.size,
            "device": str(parts.llm.device),
            "trunk": "bfloat16" if parts.llm.bf16 else "float32",
            "scorer": base.scorer,
            "judges": {name: f"{one.name} {one.version}" for name, one in parts.judges.items()},
        }
    )


def _constraint_words(parts: Parts, config: Config) -> str:
    terms = config.constraint.all_terms().items()
    return "; ".join(
        (f"{name}: " if config.constraint.terms else "")
        + f"{scorer.name} {scorer.version}, satisfied at {term.satisfied_at:g}, delta "
        f"{term.threshold:g}, {term.labels} labels"
        for (name, term), scorer in zip(terms, parts.scorers, strict=True)
    )


def _terms_words(base: Evaluation) -> str:
    """How many of the samples satisfy each term of several."""
    groups = base.groups.values()
    total = sum(group.samples for group in groups)
    names = next(iter(groups)).terms
    shares = {
        name: sum(group.terms[name].mean * group.samples for group in groups) / total
        for name in names
    }
    return "".join(f", {name} {share:.1%}" for name, share in shares.items())


def _scoring_words(config: Config, base: Evaluation) -> str:
    """What the scorer's speed means for the run."""
    each = base.seconds_per_score
    rollouts = config.prompts.scored(config.prompts.completions)
    whole = each * rollouts * config.trainer.iterations
    return (
        f"{1000 * each:.2g} ms a completion: {each * rollouts:.1f} s an iteration, "
        f"{whole / 60:.1f} min a run, beside sampling"
    )


def _placement_words(parts: Parts, config: Config) -> str:
    size, peers = parts.everyone.size, config.placement.num_learning
    if peers:
        return f"{size - peers} processes update, {peers} learn the target"
    return "1 process" if size == 1 else f"{size} processes"
