"""`cft train`: compose, take the run folder, run, and say how it ended."""

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.settings import settings
from constrained_ft.errors import CftError, ConfigError, DivergedError, Interrupted

if TYPE_CHECKING:
    from constrained_ft.config import Config
    from constrained_ft.run_folder import RunFolder, State

__all__ = ["Request", "train"]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="GROUP=OPTION and SECTION.KEY=VALUE."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="A complete configuration, such as the config.yaml of a run, instead of the groups.",
    ),
]
ConfigDirs = Annotated[
    list[Path] | None,
    typer.Option(
        "--config-dir",
        metavar="DIR",
        help="A folder of your own groups and experiments: DIR/experiment/NAME.yaml and so on.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run, as the command line says it."""

    overrides: tuple[str, ...]
    config_file: Path | None
    config_dirs: tuple[Path, ...]
    resume: str = "none"
    clean: bool = False

    def config(self) -> "Config":
        """The configuration that is asked for.

        Raises:
            ConfigError: if it is wrong.
        """
        from constrained_ft.compose import compose, load_config

        if self.config_file is None:
            return compose(self.overrides, self.config_dirs)
        if self.config_dirs:
            raise ConfigError("--config is a complete configuration and takes no --config-dir")
        return load_config(self.config_file, self.overrides)

    def names_folder(self) -> bool:
        """Whether the command line names the run folder itself."""
        given = (override.lstrip("+").partition("=")[0] for override in self.overrides)
        return self.config_file is not None or "output_dir" in given

    def options(self) -> list[str]:
        """The same request, but for its overrides, for a child process."""
        from_file = [] if self.config_file is None else ["--config", str(self.config_file)]
        folders = [part for folder in self.config_dirs for part in ("--config-dir", str(folder))]
        return [*from_file, *folders, "--resume", self.resume, *["--clean"] * self.clean]


def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    config_dir: ConfigDirs = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the configuration; start nothing.")
    ] = False,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|none|PATH",
            help="Continue a run: PATH, or the newest unfinished one of the same configuration.",
        ),
    ] = "none",
    clean: Annotated[
        bool, typer.Option("--clean", help="Delete the run that the run folder holds.")
    ] = False,
    multirun: Annotated[
        bool,
        typer.Option("-m", "--multirun", help="Run every combination of KEY=VALUE1,VALUE2,..."),
    ] = False,
) -> None:
    """Fine-tune under a constraint.

    [dim]cft train · cft train trainer.kl_weight=50 · cft train llm=pretrained
    llm.model_name_or_path=PATH data=file data.path=FILE · cft train -m seed=0,1[/]
    """
    request = Request(
        overrides=tuple(overrides or ()),
        config_file=config,
        config_dirs=tuple(config_dir or ()),
        resume=resume,
        clean=clean,
    )
    if clean and resume != "none":
        raise ConfigError("--clean deletes the run that --resume would continue; give one of them")
    if multirun:
        from constrained_ft.cli.sweep import sweep

        raise typer.Exit(sweep(request, dry_run=dry_run))
    if dry_run:
        _show(request.config())
        return
    start = _start(request)
    if start is not None:
        run(*start)


def _start(request: Request) -> "tuple[Config, RunFolder] | None":
    """The configuration and its folder, ready to be written to; None if there is nothing to do."""
    from constrained_ft.run_folder import RunFolder, newest_unfinished

    command = ["cft", *sys.argv[1:]]
    console = settings.console(stderr=True)
    config: Config | None = None
    folder: RunFolder | None = None
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
    if folder is None:
        folder = RunFolder(Path(config.output_dir))
        return config, folder.start(config, command, clean=request.clean)
    if folder.status().get("state") == "finished":
        if not settings.quiet:
            console.print(f"{folder.path} is finished; there is nothing to continue")
        return None
    folder.resume(config, command)
    return folder.config(), folder


def run(config: "Config", folder: "RunFolder") -> None:
    """Train, and write to `status.json` how it ended.

    Raises:
        CftError: whatever stopped the run.
    """
    from constrained_ft.cli.display import make_display

    settings.prepare_libraries()
    try:
        with (
            make_display(settings.console(), quiet=settings.quiet) as display,
            _signals_restored(),
        ):
            from constrained_ft.distributed import StopRequest
            from constrained_ft.train import train as train_llm

            stop = StopRequest()
            stop.install()
            train_llm(config, folder, display, stop)
        folder.write_status("finished", exit_code=0)
    except BaseException as error:
        _record(folder, error)
        raise
    finally:
        folder.close()


def _record(folder: "RunFolder", error: BaseException) -> None:
    """Write how a run failed, and tell the user what to do next."""
    state: State = "failed"
    code, reason = 1, f"{type(error).__name__}: {error}"
    again = f"`cft train --resume {folder.path}` continues"
    match error:
        case KeyboardInterrupt():
            state, code, reason = "interrupted", 130, "Ctrl-C before training began"
        case CftError():
            code, reason = error.exit_code, str(error)
            if isinstance(error, Interrupted):
                state = "interrupted"
                error.args = (f"{error}; {again}",)
            elif isinstance(error, DivergedError):
                state = "diverged"
        case _:
            log = folder.logs() / "error.log"
            log.write_text("".join(traceback.format_exception(error)))
            error.add_note(f"traceback in {log}")
    folder.write_status(state, reason=reason, exit_code=code)


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
    rollouts = prompts.prompts_per_iteration * prompts.samples_per_prompt
    weights = "all weights" if llm.lora is None else f"LoRA, rank {llm.lora.r}"
    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    sources = [config.data.path, config.data.name, *config.data.sources]
    asked = [prompts.path, prompts.name, *prompts.sources, "the corpus" * prompts.from_corpus]
    constraint, judge = config.constraint, config.evaluation.judge
    return {
        "model": f"{llm.model_name_or_path.partition('#')[0]} ({weights})",
        "corpus": _words(sources),
        "prompts": f"{_words(asked)}; {prompts.prompts_per_iteration} x "
        f"{prompts.samples_per_prompt} = {rollouts:,} completions of {prompts.max_new_tokens} "
        "tokens an iteration",
        "constraint": f"{constraint.scorer.kind}, satisfied at {constraint.satisfied_at:g}, "
        f"threshold {constraint.threshold:g}, {constraint.labels} labels",
        "judge": "none" if judge is None else judge.kind,
        "auxiliary": f"{config.auxiliary.kind}, rank {config.auxiliary.rank}",
        "schedule": f"{trainer.schedule}, {trainer.iterations} iterations x "
        f"{trainer.steps_per_iteration} = {steps:,} steps of {rows} rows",
        "kl_weight": f"{trainer.kl_weight:g}",
        "seed": str(config.seed),
        "folder": config.output_dir,
    }


def _words(parts: Sequence[str | None]) -> str:
    return ", ".join(part for part in parts if part)
