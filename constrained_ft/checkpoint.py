"""Save after an iteration, restore, keep the newest two.

A checkpoint is a folder written aside and renamed once everything in it has reached the disk; its
manifest holds the SHA-256 of every file. Tensors are safetensors, the rest is JSON: nothing that is
read back can run code. All randomness is keyed, so no generator has a state to save.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from constrained_ft.errors import CheckpointError
from constrained_ft.fused import Head
from constrained_ft.optimization import Optimization
from constrained_ft.parts import Parts
from constrained_ft.prompts import Prompt
from constrained_ft.rollouts import LabeledRollouts, Rollouts
from constrained_ft.target import Reference

_MANIFEST = "manifest.json"
_REFERENCE = "reference.safetensors"
_KEPT = 2


def save(folder: Path, iteration: int, parts: Parts, reference: Reference) -> Path:
    """Write `folder/iteration_0001` and so on; older ones but the newest two are removed.

    Args:
        folder: the run's `checkpoints/`.
        iteration: the last finished iteration.
        parts: what is saved: trained weights, optimizer, auxiliary, replay.
        reference: the newest target's, which a stale target needs.

    Raises:
        CheckpointError: when it cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"iteration_{iteration:04d}"
    aside = folder / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        _write_tensors(aside / "llm.safetensors", parts.llm.trained_parameters())
        _write_tensors(aside / "auxiliary.safetensors", parts.auxiliary.state_dict())
        state = {"iteration": iteration, **_write_optimization(aside, parts.optimization)}
        _write_tensors(aside / _REFERENCE, _reference_tensors(reference, parts.llm.head))
        state["replay"] = [
            _write_labeled(aside / f"replay_{i}.safetensors", labeled)
            for i, labeled in enumerate(parts.replay)
        ]
        (aside / "state.json").write_text(json.dumps(state))
        _seal(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.replace(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error
    for old in _folders(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, and what is wrong with newer ones."""
    faults: list[str] = []
    for candidate in reversed(_folders(folder)):
        fault = _fault(candidate)
        if fault is None:
            return candidate, faults
        faults.append(f"{candidate.name}: {fault}")
    return None, faults


def restore(checkpoint: Path, parts: Parts) -> tuple[int, Reference]:
    """Put everything back; returns the last finished iteration and the newest target's reference.

    Raises:
        CheckpointError: when the checkpoint does not fit the run's configuration.
    """
    device = parts.llm.device
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        parts.llm.load_trained(_read_tensors(checkpoint / "llm.safetensors", device))
        parts.auxiliary.load_state_dict(_read_tensors(checkpoint / "auxiliary.safetensors", device))
        _read_optimization(checkpoint, state, parts.optimization)
        parts.replay = [
            _read_labeled(checkpoint / f"replay_{i}.safetensors", entry, device)
            for i, entry in enumerate(state["replay"])
        ]
        tensors = _read_tensors(checkpoint / _REFERENCE, device)
        head = parts.llm.head
        if "weight" in tensors:
            head = replace(head, weight_VD=tensors["weight"], bias_V=tensors.get("bias"))
        reference = Reference(hidden_NTD=tensors["hidden"], head=head)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this run: {error}; use the run's own config.yaml"
        ) from error
    return int(state["iteration"]), reference


def _reference_tensors(reference: Reference, live: Head) -> dict[str, Tensor]:
    """The reference's states, and its head where the LLM trains its own."""
    tensors = {"hidden": reference.hidden_NTD}
    if reference.head.weight_VD is not live.weight_VD:
        tensors["weight"] = reference.head.weight_VD
        if reference.head.bias_V is not None:
            tensors["bias"] = reference.head.bias_V
    return tensors


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("iteration_[0-9]*")) if folder.exists() else []


def _fault(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        for name, digest in manifest.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _seal(folder: Path) -> None:
    """Write the manifest last and wait until everything is on the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {path.name: _sha256(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, folder / _MANIFEST, folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(kept, path)


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _write_optimization(folder: Path, optimization: Optimization) -> dict[str, Any]:
    state = optimization.optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, slots in state["state"].items()
        for name, value in slots.items()
    }
    _write_tensors(folder / "optimizer.safetensors", tensors)
    return {
        "param_groups": state["param_groups"],
        "scheduler": optimization.scheduler.state_dict(),
    }


def _read_optimization(folder: Path, state: dict[str, Any], optimization: Optimization) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    # AdamW keeps its step counters on the CPU.
    tensors = _read_tensors(folder / "optimizer.safetensors", torch.device("cpu"))
    for key, tensor in tensors.items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = tensor
    optimization.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
    optimization.scheduler.load_state_dict(state["scheduler"])


def _write_labeled(path: Path, labeled: LabeledRollouts) -> dict[str, Any]:
    rollouts = labeled.rollouts
    tensors = {
        "prompt": rollouts.prompt_N,
        "ids": rollouts.ids_NT,
        "mask": rollouts.mask_NT,
        "hidden": rollouts.hidden_NTD,
        "scores": labeled.scores_N,
        "satisfied": labeled.satisfied_N,
        "labels": labeled.labels_N,
    }
    _write_tensors(path, tensors)
    return {
        "iteration": rollouts.iteration,
        "prompts": [asdict(prompt) for prompt in rollouts.prompts],
        "texts": list(rollouts.texts),
    }


def _read_labeled(path: Path, entry: dict[str, Any], device: torch.device) -> LabeledRollouts:
    tensors = _read_tensors(path, device)
    prompts = [
        Prompt(**(prompt | {"token_ids": tuple(prompt["token_ids"])}))
        for prompt in entry["prompts"]
    ]
    rollouts = Rollouts(
        prompts=tuple(prompts),
        prompt_N=tensors["prompt"],
        ids_NT=tensors["ids"],
        mask_NT=tensors["mask"],
        hidden_NTD=tensors["hidden"],
        texts=tuple(entry["texts"]),
        iteration=entry["iteration"],
    )
    return LabeledRollouts(
        rollouts=rollouts,
        scores_N=tensors["scores"],
        satisfied_N=tensors["satisfied"],
        labels_N=tensors["labels"],
    )
