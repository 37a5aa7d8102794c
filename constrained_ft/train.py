"""The loop: learn the target q*, move the LLM towards it, again.

Meng et al. 2024, arXiv:2410.05559. What each line means is in the module it calls.
"""

import time
from dataclasses import replace

from constrained_ft import checkpoint, evaluate, metrics, phases
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.evaluate import Evaluation
from constrained_ft.finetune import rows_after_first_step, update_llm
from constrained_ft.loading import export, load_base
from constrained_ft.memory import memory_line, peak_memory, release_freed
from constrained_ft.parts import Parts, build_parts
from constrained_ft.placement import Done, Inline, Pending, Placement
from constrained_ft.preflight import evaluate_held_out, look_before
from constrained_ft.progress import Display
from constrained_ft.run_folder import RunFolder
from constrained_ft.samples import record_iteration
from constrained_ft.target import Target, build_target, learn_auxiliary, learn_target


def train(
    config: Config, folder: RunFolder, display: Display, stop: StopRequest
) -> list[Evaluation]:
    """Run `config` from its newest checkpoint, or from the start, to the last iteration.

    Args:
        config: the whole run.
        folder: already started or resumed; everything is written there.
        display: what people watch.
        stop: polled by every stage.

    Returns:
        The base and the fine-tuned model, measured on held-out prompts and text.

    Raises:
        CftError: the errors of every stage; the newest checkpoint is kept.
    """
    parts = build_parts(config, display, stop)
    placement: Placement = Inline()
    with parts.phases.during("evaluation"):
        base = look_before(parts, config, folder)
    done, target = _restore(parts, config, folder)
    last = config.trainer.iterations
    alternating = config.trainer.schedule == "alternating"
    for iteration in range(done + 1, last + 1):
        started = time.monotonic()
        # Learn q* from a frozen copy: from here on the LLM may change underneath. What would be
        # learned during the last update, nobody would read.
        pending: Pending
        if alternating or target is None or iteration < last:
            pending = placement.start(learn_target, parts, config, parts.llm.frozen(), iteration)
        else:
            pending = Done(target)
        learned = time.monotonic()

        # The whole difference between the schedules: wait before the LLM update, or after it.
        # The first iteration has no earlier target to use, so it always waits.
        if alternating or target is None:
            target = pending.wait()

        row = _update(parts, target, config, iteration)
        updated = time.monotonic()

        target = pending.wait()  # nothing is in flight past this line, so it is safe to save
        with parts.phases.during("samples"):
            record_iteration(parts, config, folder, target, iteration)
        with parts.phases.during("checkpoint"):
            checkpoint.save(folder.checkpoints, iteration, parts, target.reference)
        if target.iteration == iteration:  # the last overlapped iteration learns none
            row |= target.metrics
        row |= {"time/target": learned - started, "time/update": updated - learned}
        row |= {"iteration": iteration, "time/iteration": time.monotonic() - started}
        metrics.append(folder.metrics_file, row)
        release_freed()
        folder.write_status(
            "running", iteration=iteration, last_checkpoint=f"iteration_{iteration:04d}"
        )
        display.iteration(iteration, last, row)
    return _finish(parts, config, folder, base)


def _update(parts: Parts, target: Target, config: Config, iteration: int) -> dict[str, float]:
    """Stage 2, with the reference that the configuration asks for."""
    lag = iteration - target.iteration
    if config.trainer.reference == "fresh":
        with parts.phases.during("reference"):
            rows_N = rows_after_first_step(target, config, iteration)
            target = target.with_reference(parts.llm.frozen(), rows_N)
    with parts.phases.during("update"):
        row = update_llm(parts, target, config, iteration)
    return row | {"target/lag": float(lag)}


def _restore(parts: Parts, config: Config, folder: RunFolder) -> tuple[int, Target | None]:
    """The last finished iteration and its target, from the newest checkpoint that is whole."""
    found, faults = checkpoint.newest(folder.checkpoints)
    for fault in faults:
        parts.display.note(f"checkpoint passed over: {fault}")
    if found is None:
        return 0, None
    done, reference = checkpoint.restore(found, parts)
    parts.display.note(f"continuing after iteration {done}, from {found.name}")
    target = build_target(parts.replay[0], parts.auxiliary.frozen(), reference.head, config)
    return done, replace(target, reference=reference)


def _finish(parts: Parts, config: Config, folder: RunFolder, base: Evaluation) -> list[Evaluation]:
    """Fit R to the final LLM, export both, measure, compare."""
    final = parts.llm.frozen()
    learn_auxiliary(parts, config, final, config.trainer.iterations + 1)
    parts.display.phase("writing the final model", 1)
    with parts.phases.during("checkpoint"):
        export(parts.llm, folder.final_llm, folder.final_adapter)
        parts.auxiliary.frozen().save(folder.final_auxiliary)
    parts.display.advance()
    release_freed()
    with parts.phases.during("evaluation"):
        before = load_base(parts.llm, precision=config.trainer.precision)
        tuned = evaluate_held_out(parts, config, final, "tuned", before)
    evaluations = [base, tuned]
    evaluate.save(folder.evaluation_file, evaluations, config)
    parts.display.table("Held-out prompts and text", *evaluate.table(evaluations))
    _say_where_time_went(parts, folder)
    return evaluations


def _say_where_time_went(parts: Parts, folder: RunFolder) -> None:
    """Phases and memory of this process, to the person and to the run folder."""
    spent, peak = parts.phases.spent(), peak_memory(parts.llm.device)
    memory = {"peak_bytes": peak, "estimated_bytes": parts.memory_estimate}
    phases.save(folder.phases_file, spent, memory)
    parts.display.table("Where the time went", *phases.table(spent))
    parts.display.note(memory_line(peak, parts.memory_estimate))
