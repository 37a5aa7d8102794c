"""`cft train`: compose, take the run folder, run, and say how it ended."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.completion import complete_override
from constrained_ft.cli.dry_run import PaperDevice, show_prediction
from constrained_ft.cli.outcome import record
from constrained_ft.cli.settings import settings
from constrained_ft.cli.torchrun import Processes, run_processes
from constrained_ft.errors import ConfigError, storage_error

if TYPE_CHECKING:
    from constrained_ft.config import Config
    from constrained_ft.run_folder import RunFolder

__all__ = ["Request", "train"]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="GROUP=OPTION and SECTION.KEY=VALUE.",
        autocompletion=complete_override,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="Options and keys in one YAML file, or the config.yaml of a run. KEY=VALUE wins.",
    ),
]
_LAUNCH = "Several processes (what stands behind -- goes to torchrun)"
ConfigDirs = Annotated[
    list[Path] | None,
    typer.Option(
        "--config-dir",
        metavar="DIR",
        help="A folder of your own groups and experiments: DIR/experiment/NAME.yaml and so on.",
    ),
]


_ONE = Processes(per_node=1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run, as the command line says it."""

    overrides: tuple[str, ...]
    config_file: Path | None
    config_dirs: tuple[Path, ...]
    resume: str = "none"
    clean: bool = False
    fork: bool = False
    processes: Processes = _ONE
    nproc: str = "auto"
    """`--nproc-per-node` as it was given."""

    def config(self) -> "Config":
        """The configuration that is asked for.

        Raises:
            ConfigError: if it is wrong.
        """
        from constrained_ft.compose import compose, load_config
        from constrained_ft.config_file import is_complete

        if self.config_file is None or not is_complete(self.config_file):
            return compose(self.overrides, self.config_dirs, self.config_file)
        if self.config_dirs:
            raise ConfigError(
                f"{self.config_file} is a complete configuration and takes no --config-dir; leave "
                "one of them out"
            )
        return load_config(self.config_file, self.overrides)

    def check(self, config: "Config") -> None:
        """See that a configuration can run here, before anything is started.

        Raises:
            ConfigError: if it does not suit the processes.
            ExtraError: if the package of its tracker is missing.
        """
        from constrained_ft.trackers import require_installed

        self.processes.check(config)
        require_installed(config.tracker)

    def names_folder(self) -> bool:
        """Whether the command line names the run folder itself."""
        from constrained_ft.config_file import is_complete, read_config_file

        given = [override.lstrip("+").partition("=")[0] for override in self.overrides]
        if "output_dir" in given or self.config_file is None:
            return "output_dir" in given
        file = self.config_file
        return is_complete(file) or "output_dir" in read_config_file(file, self.config_dirs).values

    def options(self) -> list[str]:
        """The same request, but for its overrides, for a child process."""
        from_file = [] if self.config_file is None else ["--config", str(self.config_file)]
        folders = [part for folder in self.config_dirs for part in ("--config-dir", str(folder))]
        start = ["--resume", self.resume, *["--clean"] * self.clean]
        many = ["--nproc-per-node", self.nproc]
        if self.processes.max_restarts:
            many += ["--max-restarts", str(self.processes.max_restarts)]
        rest = ["--", *self.processes.extra] if self.processes.extra else []
        return [*from_file, *folders, *many, *start, *rest]


def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    config_dir: ConfigDirs = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check and show the configuration and its cost; start nothing."
        ),
    ] = False,
    on: Annotated[
        PaperDevice | None,
        typer.Option(
            "--on",
            help="With --dry-run: the cost on these GPUs, by data sheet; none has to be here.",
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|none|PATH",
            help="Continue a run: PATH, or the newest unfinished one of the same configuration. "
            "With -m, PATH is a sweep, whose jobs that are not done are repeated.",
        ),
    ] = "none",
    clean: Annotated[
        bool, typer.Option("--clean", help="Delete the run that the run folder holds.")
    ] = False,
    fork: Annotated[
        bool,
        typer.Option(
            "--fork",
            help="With --resume PATH: go on in a folder of its own, changed by KEY=VALUE.",
        ),
    ] = False,
    multirun: Annotated[
        bool,
        typer.Option("-m", "--multirun", help="Run every combination of KEY=VALUE1,VALUE2,..."),
    ] = False,
    best_at: Annotated[
        float,
        typer.Option(
            "--best-at",
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="With -m: the satisfaction that the best run has to have.",
        ),
    ] = 0.97,
    nproc_per_node: Annotated[
        str,
        typer.Option(
            "--nproc-per-node",
            metavar="auto|N",
            help="Processes on this machine, one for each GPU; auto: as many as there are GPUs.",
            rich_help_panel=_LAUNCH,
        ),
    ] = "auto",
    nnodes: Annotated[
        int,
        typer.Option("--nnodes", min=1, metavar="N", help="Machines.", rich_help_panel=_LAUNCH),
    ] = 1,
    node_rank: Annotated[
        int,
        typer.Option(
            "--node-rank",
            min=0,
            metavar="K",
            help="Which of them this is, from 0.",
            rich_help_panel=_LAUNCH,
        ),
    ] = 0,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint",
            metavar="HOST:PORT",
            help="Where several machines meet: a free port of the first one.",
            rich_help_panel=_LAUNCH,
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            min=0,
            metavar="N",
            help="So often, go on from the newest checkpoint when a process or machine is lost.",
            rich_help_panel=_LAUNCH,
        ),
    ] = 0,
    slurm: Annotated[
        str | None,
        typer.Option(
            "--slurm",
            metavar="SBATCH_OPTIONS",
            help='Submit the run to Slurm: --slurm "--time=4:00:00 --gpus-per-node=8", with '
            "--nnodes for several machines. With --dry-run, print the script.",
            rich_help_panel=_LAUNCH,
        ),
    ] = None,
) -> None:
    """Fine-tune under a constraint.

    [dim]cft train · cft train trainer.kl_weight=50 · cft train llm=pretrained
    llm.model_name_or_path=PATH data=file data.path=FILE · cft train -m seed=0,1[/]
    """
    if slurm is None:
        processes = _processes(nproc_per_node, nnodes, node_rank, rdzv_endpoint, max_restarts)
    else:
        processes = Processes(per_node=1, nodes=nnodes, max_restarts=max_restarts)
    request = Request(
        overrides=tuple(overrides or ()),
        config_file=config,
        config_dirs=tuple(config_dir or ()),
        resume=resume,
        clean=clean,
        fork=fork,
        processes=processes,
        nproc=nproc_per_node,
    )
    _refuse_contradictions(request, multirun=multirun)
    if on is not None and (multirun or slurm is not None or not dry_run):
        raise ConfigError("--on says where --dry-run predicts the cost of one run; add --dry-run")
    if slurm is not None:
        from constrained_ft.cli.slurm import submit

        if multirun or node_rank or rdzv_endpoint is not None:
            raise ConfigError(
                "--slurm finds out ranks and endpoint itself, and takes one run; for a sweep, give "
                "-m hydra/launcher=submitit_slurm"
            )
        submit(request, slurm, dry_run=dry_run)
        return
    if multirun:
        from constrained_ft.cli.sweep import sweep

        raise typer.Exit(sweep(request, dry_run=dry_run, best_at=best_at))
    if dry_run:
        shown = request.config()
        request.check(shown)
        _show(shown)
        show_prediction(shown, request.processes, on)
        return
    if request.processes.node_rank > 0:
        _join_first_machine(request)
        return
    start = _start(request)
    if start is not None:
        run(*start, request.processes)


def _refuse_contradictions(request: Request, *, multirun: bool) -> None:
    if request.fork and request.resume in ("none", "auto"):
        raise ConfigError("--fork needs --resume PATH, the run that it continues from")
    if request.clean and request.resume != "none":
        raise ConfigError("--clean deletes the run that --resume would continue; give one of them")
    if multirun and request.processes.nodes > 1:
        raise ConfigError("the jobs of a sweep take one machine each; leave out --nnodes, or -m")


def _processes(
    nproc: str, nodes: int, node_rank: int, endpoint: str | None, max_restarts: int = 0
) -> Processes:
    """What the options say of processes.

    Raises:
        ConfigError: if they contradict each other.
    """
    if nproc == "auto":
        settings.prepare_libraries()
        import torch

        per_node = torch.accelerator.device_count()
    elif nproc.isdecimal():
        per_node = int(nproc)
    else:
        raise ConfigError(f"--nproc-per-node {nproc} must be auto or a number")
    if (nodes > 1) != (endpoint is not None):
        raise ConfigError("--nnodes and --rdzv-endpoint belong together; give both, or none")
    if nodes > 1 and any(part.startswith("--max-restarts") for part in settings.torchrun):
        raise ConfigError("with several machines, --max-restarts stands before --: cft restarts")
    if node_rank >= nodes:
        raise ConfigError(f"--node-rank {node_rank} must be below --nnodes {nodes}")
    return Processes(
        per_node=max(per_node, 1),
        nodes=nodes,
        node_rank=node_rank,
        endpoint=endpoint,
        max_restarts=max_restarts,
        extra=settings.torchrun,
    )


def _join_first_machine(request: Request) -> None:
    """Start this machine's processes of a run that the first machine has begun."""
    from constrained_ft.cli.machines import join_run
    from constrained_ft.run_folder import RunFolder

    if request.resume in ("none", "auto") or request.fork:
        config = request.config()
        if not request.names_folder():
            raise ConfigError("--node-rank above 0 needs output_dir=PATH, as the first one has")
        folder = RunFolder(Path(config.output_dir))
    else:
        folder = RunFolder(Path(request.resume))
        config = folder.config()
    request.check(config)
    join_run(folder, request.processes, config.placement.timeout)


def _start(request: Request) -> "tuple[Config, RunFolder] | None":
    """The configuration and its folder, ready to be written to; None if there is nothing to do."""
    from constrained_ft.run_folder import RunFolder, newest_unfinished

    command = ["cft", *sys.argv[1:]]
    console = settings.console(stderr=True)
    config: Config | None = None
    folder: RunFolder | None = None
    if request.fork:
        return _fork(request, command)
    if request.resume == "none":
        config = request.config()
    elif request.resume != "auto":
        folder = RunFolder(Path(request.resume))
        asked = request.overrides or request.config_file
        config = request.config() if asked else folder.config()
    else:
        config = request.config()
        if request.names_folder():
            named = RunFolder(Path(config.output_dir))
            folder = named if named.status() else None
        else:
            folder = newest_unfinished(Path(config.output_dir).parent, config)
        if folder is None and not settings.quiet:
            console.print("no unfinished run of this configuration; starting a new one")
    request.check(config)
    if folder is None:
        folder = RunFolder(Path(config.output_dir))
        return config, folder.start(config, command, clean=request.clean)
    if folder.status().get("state") == "finished":
        if not settings.quiet:
            console.print(f"{folder.path} is finished; there is nothing to continue")
        return None
    folder.resume(config, command)
    return folder.config(), folder


def _fork(request: Request, command: list[str]) -> "tuple[Config, RunFolder]":
    """A run folder of its own that continues where another run stands, with changes."""
    from datetime import UTC, datetime

    from constrained_ft.compose import load_config
    from constrained_ft.run_folder import RunFolder

    source = RunFolder(Path(request.resume))
    if request.config_file is not None:
        config = request.config()
    else:
        config = load_config(source.config_file, request.overrides)
    if Path(config.output_dir).resolve() == source.path.resolve() or not request.names_folder():
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        where = f"{source.path}-fork-{now}"
        config = config.model_copy(update={"output_dir": where})
    request.check(config)
    folder = RunFolder(Path(config.output_dir))
    return config, folder.fork(source, config, command, clean=request.clean)


def run(config: "Config", folder: "RunFolder", processes: Processes) -> None:
    """Train, and write to `status.json` how it ended.

    Raises:
        CftError: whatever stopped the run.
    """
    try:
        if processes.nodes > 1:
            from constrained_ft.cli.machines import lead_run

            lead_run(folder, processes, config.placement.timeout)
        elif processes.total > 1:
            run_processes(folder, processes)
        else:
            _run_here(config, folder)
    finally:
        folder.close()
    if not settings.quiet:
        command = shlex.join(["cft", "report", str(folder.path)])
        settings.console().print(f"{command} makes a page of it", soft_wrap=True, markup=False)


def _run_here(config: "Config", folder: "RunFolder") -> None:
    from constrained_ft.cli.display import Several, logged_display
    from constrained_ft.trackers import tracked

    settings.prepare_libraries()
    console = settings.console()
    try:
        with (
            logged_display(console, folder.logs(), 0, quiet=settings.quiet) as display,
            _signals_restored(),
        ):
            from constrained_ft.distributed import StopRequest
            from constrained_ft.train import train as train_llm

            stop = StopRequest()
            stop.install()
            with tracked(config, folder, display) as tracker:
                train_llm(config, folder, Several(display, tracker), stop)
        folder.write_status("finished", exit_code=0)
    except BaseException as raised:
        error = storage_error(raised)
        record(folder, error or raised)
        if error is None:
            raise
        raise error from raised


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Put the handlers of the signals that a run takes over back when it ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _show(config: "Config") -> None:
    """The resolved configuration in one box."""
    from constrained_ft.cli.display import make_display

    with make_display(settings.console(), quiet=settings.quiet) as display:
        display.panel(f"{config.name} (dry run, nothing is started)", summary(config))


def summary(config: "Config") -> dict[str, str]:
    """What a configuration comes to, a line for each part."""
    llm, prompts, trainer = config.llm, config.prompts, config.trainer
    steps = trainer.iterations * trainer.steps_per_iteration
    scored = prompts.scored(prompts.completions)
    weights = "all weights" if llm.lora is None else f"LoRA, rank {llm.lora.r}"
    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    sources = [config.data.path, config.data.name, *config.data.sources]
    asked = [prompts.path, prompts.name, *prompts.sources, "the corpus" * prompts.from_corpus]
    constraint, judges = config.constraint, config.evaluation.all_judges()
    return {
        "model": f"{llm.model_name_or_path.partition('#')[0]} ({weights})",
        "corpus": _words(sources),
        "prompts": f"{_words(asked)}; {prompts.prompts_per_iteration} x "
        f"{prompts.samples_per_prompt} = {prompts.completions:,} completions of "
        f"{prompts.max_new_tokens} tokens an iteration"
        + (f", {scored:,} of them scored" if scored < prompts.completions else ""),
        "constraint": "; ".join(
            (f"{name}: " if constraint.terms else "")
            + f"{term.scorer.kind}, satisfied at {term.satisfied_at:g}, "
            f"threshold {term.threshold:g}, {term.labels} labels"
            for name, term in constraint.all_terms().items()
        ),
        "judges": ", ".join(one.scorer.kind for one in judges.values()) or "none",
        "auxiliary": f"{config.auxiliary.kind}, rank {config.auxiliary.rank}"
        + (", one for each term" if config.auxiliary.terms == "product" else ""),
        "schedule": f"{trainer.schedule}, {trainer.iterations} iterations x "
        f"{trainer.steps_per_iteration} = {steps:,} steps of {rows} rows",
        "pull": trainer.pull_words(trainer.kl_weight),
        "seed": str(config.seed),
        "folder": config.output_dir,
    }


def _words(parts: Sequence[str | None]) -> str:
    return ", ".join(part for part in parts if part)
