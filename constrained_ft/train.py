"""The loop: learn the target q*, move the LLM towards it, again.

Meng et al. 2024, arXiv:2410.05559. What each line means is in the module it calls.
"""

import time

from constrained_ft import checkpoint, equations, metrics, paired, phases, results
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest, World
from constrained_ft.errors import DivergedError
from constrained_ft.finetune import update_llm, with_fresh_reference
from constrained_ft.loading import export, load_base
from constrained_ft.machine import release_freed
from constrained_ft.memory import memory_line, peak_memory
from constrained_ft.model_card import write_cards
from constrained_ft.paired import differences
from constrained_ft.parts import Parts, build_parts, shard_llm
from constrained_ft.placement import Done, Inline, Peers, Pending, divide
from constrained_ft.preflight import evaluate_held_out, look_before, rehearse
from constrained_ft.progress import Display
from constrained_ft.results import Evaluation
from constrained_ft.run_folder import RunFolder
from constrained_ft.samples import record_iteration
from constrained_ft.target import Target
from constrained_ft.trl_baselines import require_trl, train_by_trl


def train(
    config: Config,
    folder: RunFolder,
    display: Display,
    stop: StopRequest,
    world: World | None = None,
) -> list[Evaluation]:
    """Run `config` from its newest checkpoint, or from the start, to the last iteration.

    Args:
        config: the whole run.
        folder: already started or resumed; the first rank writes everything there.
        display: what people watch.
        stop: polled by every stage.
        world: all processes of the run, each of which calls this; None is this one alone.

    Returns:
        The base and the fine-tuned model, measured on held-out prompts and text.

    Raises:
        CftError: the errors of every stage; the newest checkpoint is kept.
    """
    world = world or World.alone()
    require_trl(config)
    parts = build_parts(config, display, stop, folder=folder, world=world)
    placement = _place(parts, config)
    with parts.phases.during("evaluation"):
        base = look_before(parts, config, folder)
    done, target = checkpoint.continue_from_newest(parts, config, folder)
    last = config.trainer.iterations
    if isinstance(placement, Peers) and placement.learns:
        placement.serve(parts, config, last)
        return _finish(parts, config, folder, base, placement)
    if target is not None and target.iteration < done:
        target = None  # that of a run which was to end there and is longer now: two steps too old
    if done == 0:
        rehearse(parts, config, folder)
    done = train_by_trl(parts, config, folder, done)  # a baseline: nothing is left for the loop
    alternating = config.trainer.schedule == "alternating"
    for iteration in range(done + 1, last + 1):
        started = time.monotonic()
        # Learn q* from a frozen copy: from here on the LLM may change underneath. What would be
        # learned during the last update, nobody would read.
        pending: Pending
        waits = alternating or target is None
        if waits or iteration < last:
            pending = placement.start(parts, config, parts.llm.frozen(), iteration)
        else:
            assert target is not None
            pending = Done(target)
        learned = time.monotonic()

        # The whole difference between the schedules: wait before the LLM update, or after it.
        # The first iteration has no earlier target to use, so it always waits.
        if waits:
            target = pending.wait()
        assert target is not None
        assert iteration - target.iteration == (0 if waits else 1)

        row = _update(parts, target, config, folder, iteration)
        if target.below is not None:
            target.below.clear()  # nothing reads it again
        updated = time.monotonic()

        target = pending.wait()  # nothing is in flight past this line, so it is safe to save
        if target.iteration == iteration:  # the last overlapped iteration learns none
            row |= target.metrics
        row |= {"iteration": float(iteration)}
        row |= {"time/target": learned - started, "time/update": updated - learned}
        row = _keep(parts, config, folder, target, row, started)
        release_freed()
        display.iteration(iteration, last, row)
    # R of the final LLM, for guided decoding and the measurements.
    placement.start(parts, config, parts.llm.frozen(), last + 1).wait()
    with parts.llm.gathered():
        return _finish(parts, config, folder, base, placement)


def _place(parts: Parts, config: Config) -> Inline | Peers:
    """This rank's side of the work, and its part of the weights where they are sharded."""
    if config.placement.kind == "inline":
        shard_llm(parts, config)
        return Inline()
    peers = divide(parts, config)
    if not peers.learns:
        shard_llm(parts, config)
    return peers


def _keep(
    parts: Parts,
    config: Config,
    folder: RunFolder,
    target: Target,
    row: dict[str, float],
    started: float,
) -> dict[str, float]:
    """Write down what an iteration came to; the whole row is the first rank's."""
    iteration = int(row["iteration"])
    release_freed()  # what an update leaves is as much as a checkpoint takes
    with parts.llm.gathered(), parts.phases.during("samples"):
        if parts.everyone.leads:
            row |= record_iteration(parts, config, folder, target, iteration)
    row |= {"time/iteration": time.monotonic() - started}
    if parts.everyone.leads:
        row |= metrics.budget(parts.prepared, metrics.read(folder.metrics_file), row)
    with parts.phases.during("checkpoint"):
        checkpoint.save(folder.checkpoints, parts, config, target, row)
    if parts.everyone.leads:
        metrics.append(folder.metrics_file, row)
        folder.write_status(
            "running", iteration=iteration, last_checkpoint=f"iteration_{iteration:04d}"
        )
    return row


def _update(
    parts: Parts, target: Target, config: Config, folder: RunFolder, iteration: int
) -> dict[str, float]:
    """Stage 2, with the reference that the configuration asks for."""
    versions = {
        "target/lag": float(iteration - target.iteration),
        "version/llm": iteration - 1.0,
        "version/auxiliary": float(target.iteration),
        "version/data": float(target.rollouts.iteration),
    }
    if config.trainer.target_rate is not None:
        parts.kl_weight = equations.dual_step(
            parts.kl_weight, target.metrics["rollouts/satisfaction"], config.trainer.target_rate
        )
    if not target.usable:
        for _ in range(config.trainer.steps_per_iteration):
            parts.optimization.pass_step()
        return versions | {"update/skipped_steps": float(config.trainer.steps_per_iteration)}
    target = with_fresh_reference(parts, target, config, iteration)
    with parts.phases.during("update"):
        try:
            row = update_llm(parts, target, config, iteration)
            parts.faults = 0 if row["update/skipped_steps"] == 0 else parts.faults
        except DivergedError as error:
            if config.guard.on_failure != "rollback":
                raise
            parts.tolerate(str(error), config.guard, f"iteration {iteration} changes nothing")
            checkpoint.restore_llm(folder.checkpoint(iteration - 1), parts)
            for _ in range(config.trainer.steps_per_iteration):
                parts.optimization.pass_step()
            row = {"update/rolled_back": 1.0}
    return row | versions


def _finish(
    parts: Parts,
    config: Config,
    folder: RunFolder,
    base: Evaluation,
    placement: Inline | Peers,
) -> list[Evaluation]:
    """Export the LLM and R, measure, compare."""
    final = parts.llm.frozen()
    if parts.everyone.leads:
        parts.display.phase("writing the final model", 1)
        with parts.phases.during("checkpoint"):
            export(parts.llm, folder.final_llm, folder.final_adapter)
            parts.auxiliary.frozen().save(folder.final_auxiliary)
        parts.display.advance()
    release_freed()
    parts.world = parts.everyone
    with parts.phases.during("evaluation"):
        before = load_base(parts.llm, precision=config.trainer.precision)
        tuned = evaluate_held_out(parts, config, final, "tuned", before)
    evaluations = [base, tuned]
    if parts.everyone.leads:
        found = differences(evaluations)
        cost = metrics.cost(metrics.read(folder.metrics_file))
        counts = {name: value for name, value in cost.items() if name != "budget/seconds"}
        results.save(
            folder.evaluation_file,
            evaluations,
            config,
            differences=paired.plain(found),
            budgets={"tuned": counts},  # the file is the same in every run
        )
        write_cards((folder.final_llm, folder.final_adapter), evaluations, config)
        parts.display.table("Held-out prompts and text", *results.table(evaluations))
        parts.display.table("The same prompts and random numbers", *paired.table(found))
        parts.display.table("What training has cost", *metrics.cost_table({"tuned": cost}))
    _say_where_time_went(parts, folder)
    if isinstance(placement, Peers) and not placement.learns:
        parts.display.note(placement.advice())
    return evaluations


def _say_where_time_went(parts: Parts, folder: RunFolder) -> None:
    """Phases and memory of this process, to the person and to the run folder."""
    spent, peak = parts.phases.spent(), peak_memory(parts.llm.device)
    memory = {"peak_bytes": peak, "estimated_bytes": parts.memory_estimate}
    if parts.everyone.leads:
        phases.save(folder.phases_file, spent, memory)
    parts.display.table("Where the time went", *phases.table(spent))
    parts.display.note(memory_line(peak, parts.memory_estimate))
