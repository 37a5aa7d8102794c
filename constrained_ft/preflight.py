"""The last look before training: the base model measured, and one panel of what will happen."""

from constrained_ft import checkpoint, evaluate
from constrained_ft.config import Config
from constrained_ft.distributed import pack, unpack
from constrained_ft.errors import ScorerError
from constrained_ft.llm import FrozenLLM
from constrained_ft.loading import rehearse_export
from constrained_ft.memory import (
    estimate_memory,
    forget_peak,
    held_memory,
    memory_words,
    recent_peak,
)
from constrained_ft.parts import Parts
from constrained_ft.run_folder import RunFolder
from constrained_ft.samples import record_base

_REHEARSED = 32  # tokens that the exported model is tried out on


def look_before(parts: Parts, config: Config, folder: RunFolder) -> evaluate.Evaluation:
    """Measure the base model and announce the run.

    Raises:
        ScorerError: when the base satisfies the constraint always or never: nothing to learn from.
    """
    device = parts.llm.device
    watched, held = forget_peak(device), held_memory(device) or 0
    base = _evaluate_base(parts, config, folder)
    taken = recent_peak(device) - held if watched else 0
    parts.memory_estimate = estimate_memory(parts.llm, parts.prompts, config, taken)
    _announce(parts, config, folder, base)
    if parts.everyone.leads:
        record_base(parts, config, folder)
    return base


def rehearse(parts: Parts, config: Config, folder: RunFolder) -> None:
    """Save, export and read both back before the first step: what fails then, fails now."""
    if not parts.everyone.leads:
        return
    parts.display.phase("rehearsing the checkpoint and the export", 1)
    with parts.phases.during("rehearsal"):
        saved = checkpoint.save(folder.checkpoints, parts, config, None, {"iteration": 0.0})
        checkpoint.restore(saved, parts, config)
        rehearse_export(
            parts.llm, folder.rehearsal, parts.corpus.training[0].token_ids[:_REHEARSED]
        )
    parts.display.advance()


def _evaluate_base(parts: Parts, config: Config, folder: RunFolder) -> evaluate.Evaluation:
    """The model before training; measured once, read back when a run is resumed."""
    # The first rank looks, so that all do the same.
    _, measured = unpack(parts.everyone.tell(pack({}, folder.evaluation_file.exists())))
    if measured:
        return evaluate.load(folder.evaluation_file)[0]
    base = evaluate_held_out(parts, config, parts.llm.frozen(), "base", base=None)
    if parts.everyone.leads:
        evaluate.save(folder.evaluation_file, [base], config)
    return base


def evaluate_held_out(
    parts: Parts, config: Config, llm: FrozenLLM, name: str, base: FrozenLLM | None
) -> evaluate.Evaluation:
    """Measure a model on the run's held-out prompts and text."""
    prompts = evaluate.choose_prompts(parts.prompts.held_out, config.evaluation.max_prompts)
    total = len(prompts) * config.evaluation.samples_per_prompt
    parts.display.phase(f"evaluating the {name} model", total)
    return evaluate.evaluate(
        llm,
        prompts,
        parts.corpus.validation,
        parts.scorer,
        parts.judge,
        config,
        model=name,
        base=base,
        display=parts.display,
        stop=parts.stop,
        world=parts.everyone,
    )


def _announce(parts: Parts, config: Config, folder: RunFolder, base: evaluate.Evaluation) -> None:
    """One panel before training; refuses a constraint that the base always or never satisfies."""
    samples = sum(group.samples for group in base.groups.values())
    satisfied = sum(group.satisfaction.mean * group.samples for group in base.groups.values())
    rate = satisfied / samples
    if config.trainer.kl_weight > 0 and rate in (0.0, 1.0):
        raise ScorerError(
            f"the base model satisfies the constraint in {round(satisfied)} of {samples} probe "
            "samples, so there is nothing to learn from; change constraint.satisfied_at "
            f"({'raise' if rate == 1 else 'lower'} it), constraint.scorer or the prompts"
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
            f"lambda {trainer.kl_weight:g}",
            "constraint": f"{parts.scorer.name} {parts.scorer.version}, satisfied at "
            f"{config.constraint.satisfied_at:g}, delta {config.constraint.threshold:g}, "
            f"{config.constraint.labels} labels",
            "base satisfies": f"{rate:.1%} of {samples} probe samples",
            "schedule": f"{trainer.schedule}, {_placement_words(parts, config)}",
            "memory": memory_words(parts.llm, parts.memory_estimate),
            "folder": str(folder.path),
        },
    )
    if not parts.everyone.leads:
        return
    folder.add_environment(
        {
            "processes": parts.everyone.size,
            "device": str(parts.llm.device),
            "trunk": "bfloat16" if parts.llm.bf16 else "float32",
            "scorer": f"{parts.scorer.name} {parts.scorer.version}",
            "judge": None if parts.judge is None else f"{parts.judge.name} {parts.judge.version}",
        }
    )


def _placement_words(parts: Parts, config: Config) -> str:
    size, peers = parts.everyone.size, config.placement.peers
    if config.placement.kind == "peers":
        return f"{size - peers} processes update, {peers} learn the target"
    return "1 process" if size == 1 else f"{size} processes"
