"""Hand a finished run over: model or adapter, auxiliary and card in one folder, or on a hub."""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

from constrained_ft import results
from constrained_ft.config import Config
from constrained_ft.errors import CftError, CheckpointError, ConfigError, ModelError
from constrained_ft.model_card import base_on_a_hub, model_card
from constrained_ft.named_models import finished_run
from constrained_ft.progress import Display
from constrained_ft.resources import one_line
from constrained_ft.results import Evaluation
from constrained_ft.run_folder import RunFolder, write_atomically

Form = Literal["merged", "adapter"]


def export_command(
    target: str,
    output: Path,
    *,
    form: Form,
    push: str | None,
    public: bool,
    display: Display,
) -> None:
    """Write a folder that plain transformers (`merged`) or PEFT (`adapter`) loads.

    Beside the weights it holds the card and `auxiliary/`, which `AuxiliaryLogitsProcessor` reads.
    The adapter form has no tokenizer: it is the base model's. Nothing of it names a folder of this
    machine; a base that is on no hub is therefore named in the card alone.

    Args:
        target: a run folder.
        output: the folder; it must not exist, or be empty.
        form: the whole model, or the LoRA adapter alone.
        push: a hub repository to upload to as well, `user/name`.
        public: upload for everybody to see.
        display: what people watch.

    Raises:
        ConfigError: when the target is no finished run or has no adapter, the output is taken, or
            the repository is not named properly or is public without `public`.
        CheckpointError: when the run's files cannot be read, or the folder not be written.
        ModelError: when the upload fails; the folder is there nevertheless.
    """
    run = finished_run(target, "cft export")
    if form == "adapter" and not run.final_adapter.is_dir():
        raise ConfigError(
            f"{target} trained all weights and has no adapter: leave --form adapter out"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already: give a folder that is new or empty")
    if push is not None:
        _check_repository(push, public=public)
    elif public:
        raise ConfigError("--public says how to upload: give --push REPO_ID with it")
    display.phase(f"writing {output}", 1)
    _write(run, output, form)
    display.advance()
    if push is not None:
        display.phase(f"uploading to {push}", 1)
        _upload(output, push, public=public)


def _write(run: RunFolder, output: Path, form: Form) -> None:
    """All or nothing: beside its place first."""
    config, evaluations = run.config(), _evaluations(run)
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    source = run.final_llm if form == "merged" else run.final_adapter
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("README.md"))
        shutil.copytree(run.final_auxiliary, partial / "auxiliary")
        if form == "adapter":
            _name_the_base(partial / "adapter_config.json", config)
        write_atomically(partial / "README.md", model_card(evaluations, config, form=form))
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot export {run.path} to {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _evaluations(run: RunFolder) -> list[Evaluation]:
    """The results for the card."""
    file = run.evaluation_file
    try:
        return results.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}, the results for the card, cannot be read; write it again with "
            f"`cft evaluate {run.path} --output {file}` ({one_line(error)})"
        ) from error


def _name_the_base(file: Path, config: Config) -> None:
    """The base by its hub id, or not at all: a path says nothing elsewhere."""
    settings = json.loads(file.read_text())
    settings["base_model_name_or_path"] = base_on_a_hub(config)
    settings["revision"] = config.llm.revision
    write_atomically(file, json.dumps(settings, indent=2) + "\n")


def _check_repository(repository: str, *, public: bool) -> None:
    """See before anything is written whether this can be uploaded as it was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        found = huggingface_hub.HfApi().repo_info(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: {one_line(error)}") from error
    except RepositoryNotFoundError:
        return
    except (OSError, ValueError, RuntimeError) as error:
        raise _upload_failure(repository, error) from error
    if not found.private and not public:
        raise ConfigError(
            f"--push {repository}: the repository is public, so everybody would see the upload; "
            "say --public if that is meant, or name another one"
        )


def _upload(folder: Path, repository: str, *, public: bool) -> None:
    """Private unless asked for; the token is the environment's or that of `hf auth login`."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model of constrained-ft"
        )
    except (OSError, ValueError, RuntimeError) as error:
        failure = _upload_failure(repository, error)
        failure.args = (f"{failure}; the export is in {folder}",)
        raise failure from error


def _upload_failure(repository: str, error: Exception) -> CftError:
    return ModelError(
        f"cannot upload to {repository}: log in with `hf auth login`, or set HF_TOKEN to a token "
        f"that may write there ({one_line(error)})"
    )
