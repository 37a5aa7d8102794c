"""Save after an iteration, restore, keep the newest two.

A checkpoint is a folder written aside and renamed once everything in it has reached the disk; its
manifest, written last, holds size and SHA-256 of every file. Tensors are safetensors, the rest is
JSON: nothing that is read back can run code. All randomness is keyed and every order is a function
of counters, so the state is the trained weights, the optimizer and its schedule, R, the replayed
rollouts, what the newest target is built again from, and the iteration.

Where weights are sharded, all ranks that share them save together: each writes its part of the
weights and of the optimizer to a folder inside, the first everything else.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from constrained_ft import metrics
from constrained_ft.config import Config
from constrained_ft.distributed import pack, unpack
from constrained_ft.errors import CheckpointError
from constrained_ft.fused import Head
from constrained_ft.optimization import Optimization
from constrained_ft.parts import Parts
from constrained_ft.rollouts import labeled_facts, labeled_from, labeled_tensors
from constrained_ft.run_folder import RunFolder
from constrained_ft.sharding import read_shards, write_shards
from constrained_ft.target import Facts, Reference, Target, build_target

_MANIFEST, _STATE = "manifest.json", "state.json"
_LLM, _AUXILIARY = "llm.safetensors", "auxiliary.safetensors"
_OPTIMIZER, _TARGET = "optimizer.safetensors", "target.safetensors"
_SHARDS = "shards"  # a folder, in the place of the LLM's and the optimizer's files
_KEPT = 2
_SPARE = 1.2  # times what is about to be written has to be free
# What reading a file may raise that says something else than it should.
_UNFIT = (
    OSError,
    LookupError,
    TypeError,
    RuntimeError,
    ValueError,
    AttributeError,
    ArithmeticError,
)


def save(
    folder: Path,
    parts: Parts,
    config: Config,
    target: Target | None,
    row: Mapping[str, float],
) -> Path:
    """Write `folder/iteration_0001` and so on; older ones but the newest two are removed.

    Args:
        folder: the run's `checkpoints/`.
        parts: what is saved: trained weights, optimizer, auxiliary, replay.
        config: the whole run. Where it shards weights, all ranks that share them save together;
            else the first does.
        target: the newest one; None before the first iteration.
        row: the metrics of the last finished iteration, which it names.

    Raises:
        CheckpointError: when it cannot be written; earlier checkpoints are untouched.
    """
    iteration = int(row["iteration"])
    final = folder / f"iteration_{iteration:04d}"
    sharded = config.trainer.sharding != "none"
    if not (parts.everyone.leads or sharded):
        return final
    aside = folder / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    files, state = _contents(parts, config, target)
    state |= {"iteration": iteration, "row": dict(row)}
    try:
        if parts.everyone.leads:
            _begin(folder, aside, files)
        if sharded:
            shards = {_LLM: files.pop(_LLM), _OPTIMIZER: files.pop(_OPTIMIZER)}
            state["moments"] = list(shards[_OPTIMIZER])
            _, told = unpack(parts.world.tell(pack({}, aside.name)))
            with parts.world.together():
                write_shards(folder / str(told) / _SHARDS, _named(shards), parts.world)
        if parts.everyone.leads:
            for name, tensors in files.items():
                _write_tensors(aside / name, tensors)
            (aside / _STATE).write_text(json.dumps(state))
            _seal(aside)
            if final.exists():
                shutil.rmtree(final)
            aside.replace(final)
            _sync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error
    if parts.everyone.leads:
        _prune(folder)
    if sharded:
        parts.world.agree()  # from here on all may read it
    return final


def _begin(folder: Path, aside: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A new folder to write to, and the space for it."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".tmp-*"):  # by a process that was killed
        shutil.rmtree(left)
    _require_space(folder, files)
    aside.mkdir()


def _named(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors that are sharded under names of their own."""
    return {f"{file}/{name}": t for file, tensors in shards.items() for name, t in tensors.items()}


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, and what is wrong with newer ones."""
    faults: list[str] = []
    for candidate in reversed(_folders(folder)):
        fault = _fault(candidate)
        if fault is None:
            return candidate, faults
        faults.append(f"{candidate.name}: {fault}")
    return None, faults


def continue_from_newest(
    parts: Parts, config: Config, folder: RunFolder
) -> tuple[int, Target | None]:
    """The last finished iteration and its target, from the newest checkpoint that is whole.

    Raises:
        CheckpointError: when iterations are finished and no checkpoint is whole: a run is never
            begun again in silence.
    """
    name = None
    if parts.everyone.leads:
        found, faults = newest(folder.checkpoints)
        for fault in faults:
            parts.display.note(f"checkpoint passed over: {fault}")
        if found is None and (faults or folder.status().get("iteration", 0) > 0):
            raise CheckpointError(
                f"{folder.checkpoints} holds no whole checkpoint, so {folder.path} cannot be "
                "continued; --clean deletes the run and starts it again"
            )
        name = None if found is None else found.name
    _, told = unpack(parts.everyone.tell(pack({}, name)))
    if told is None:
        return 0, None
    chosen = folder.checkpoints / str(told)
    done, target, row = restore(chosen, parts, config)
    if parts.everyone.leads and done > 0:
        for note in differences(chosen, parts):
            parts.display.note(note)
        parts.display.note(f"continuing after iteration {done}, from {chosen.name}")
        # The process may have been killed between saving and this.
        if done not in {past["iteration"] for past in metrics.read(folder.metrics_file)}:
            metrics.append(folder.metrics_file, row)
    return done, target


def restore(
    checkpoint: Path, parts: Parts, config: Config
) -> tuple[int, Target | None, dict[str, float]]:
    """Put everything back.

    Returns:
        The last finished iteration, the newest target and that iteration's metrics.

    Raises:
        CheckpointError: when the checkpoint does not fit the run's configuration.
    """
    device = parts.llm.device
    restore_llm(checkpoint, parts)
    try:
        state = json.loads((checkpoint / _STATE).read_text())
        tensors = _read_tensors(checkpoint / _AUXILIARY, device)
        _require_same(parts.auxiliary.state_dict(), tensors)
        parts.auxiliary.load_state_dict(tensors)
        parts.replay = [
            labeled_from(_read_tensors(checkpoint / f"replay_{i}.safetensors", device), facts)
            for i, facts in enumerate(state["replay"])
        ]
        parts.faults = int(state["faults"])
        parts.kl_weight = float(state["kl_weight"])
        target = _read_target(checkpoint, state["target"], parts, config)
        return int(state["iteration"]), target, dict(state["row"])
    except _UNFIT as error:
        raise _misfit(checkpoint, error) from error


def restore_llm(checkpoint: Path, parts: Parts) -> None:
    """Put the LLM, its optimizer and its schedule back, and nothing else.

    Raises:
        CheckpointError: when they do not fit.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text())
        own = parts.llm.trained_parameters()
        if (checkpoint / _SHARDS).is_dir():
            tensors = {name: torch.empty_like(parameter) for name, parameter in own.items()}
            moments = {key: _empty_moment(key, list(own.values())) for key in state["moments"]}
            read_shards(checkpoint / _SHARDS, _named({_LLM: tensors, _OPTIMIZER: moments}))
        else:
            tensors = _read_tensors(checkpoint / _LLM, parts.llm.device)
            _require_same(own, tensors)
            # AdamW keeps its step counters on the CPU.
            moments = _read_tensors(checkpoint / _OPTIMIZER, torch.device("cpu"))
        _put_optimization(moments, state, parts)
        parts.llm.load_trained(tensors)
    except _UNFIT as error:
        raise _misfit(checkpoint, error) from error


def differences(checkpoint: Path, parts: Parts) -> list[str]:
    """What is otherwise than when the checkpoint was saved, and keeps bits from being the same."""
    then = json.loads((checkpoint / _STATE).read_text())["made_with"]
    return [
        f"{name} was {then.get(name)} and is {now}: results may differ in their last bits"
        for name, now in _made_with(parts).items()
        if then.get(name) != now
    ]


def _made_with(parts: Parts) -> dict[str, Any]:
    return {
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "the number of threads": torch.get_num_threads(),
        "the number of processes": parts.everyone.size,
        "the device": str(parts.llm.device.type),
        "the trunk's precision": "bfloat16" if parts.llm.bf16 else "float32",
    }


def _misfit(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} does not fit this run: {error}; use the run's own config.yaml"
    )


def _contents(
    parts: Parts, config: Config, target: Target | None
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """Files of tensors, and the state beside them."""
    moments, schedule = _optimization(parts.optimization)
    files: dict[str, Mapping[str, Tensor]] = {
        _LLM: parts.llm.trained_parameters(),
        _AUXILIARY: parts.auxiliary.state_dict(),
        _OPTIMIZER: moments,
    }
    for i, labeled in enumerate(parts.replay):
        files[f"replay_{i}.safetensors"] = labeled_tensors(labeled)
    state: dict[str, Any] = {
        **schedule,
        "replay": [labeled_facts(labeled) for labeled in parts.replay],
        "faults": parts.faults,
        "kl_weight": parts.kl_weight,
        "target": None,
        "made_with": _made_with(parts),
    }
    if target is not None:
        files[_TARGET] = _target_tensors(target, parts, config)
        state["target"] = {
            "entropy": target.facts.entropy,
            "usable": target.usable,
            "metrics": target.metrics,
        }
    return files, state


def _target_tensors(target: Target, parts: Parts, config: Config) -> dict[str, Tensor]:
    """What a target is built again from, beside R and the newest rollouts."""
    tensors = {
        "log_satisfied": target.facts.log_satisfied_S,
        "log_violated": target.facts.log_violated_S,
        "kl": target.facts.kl_N,
    }
    if config.trainer.reference == "matched":  # the others are made anew by the update
        tensors["hidden"] = target.reference.hidden_NTD
        head, live = target.reference.head, parts.llm.head
        if head.weight_VD is not live.weight_VD:  # the LLM trains its own
            tensors["weight"] = head.weight_VD
            if head.bias_V is not None:
                tensors["bias"] = head.bias_V
    return tensors


def _read_target(
    checkpoint: Path, state: dict[str, Any] | None, parts: Parts, config: Config
) -> Target | None:
    if state is None:
        return None
    tensors = _read_tensors(checkpoint / _TARGET, parts.llm.device)
    facts = Facts(
        log_satisfied_S=tensors["log_satisfied"],
        log_violated_S=tensors["log_violated"],
        kl_N=tensors["kl"],
        entropy=float(state["entropy"]),
    )
    head: Head = parts.llm.head.frozen()
    if "weight" in tensors:
        head = replace(head, weight_VD=tensors["weight"], bias_V=tensors.get("bias"))
    target = build_target(parts.replay[0], parts.auxiliary.frozen(), head, config, facts=facts)
    if "hidden" in tensors:
        target = replace(target, reference=Reference(hidden_NTD=tensors["hidden"], head=head))
    return replace(target, usable=bool(state["usable"]), metrics=dict(state["metrics"]))


def _folders(folder: Path) -> list[Path]:
    found = folder.glob("iteration_[0-9]*") if folder.exists() else ()
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _prune(folder: Path) -> None:
    """Remove what is older than the newest two that have all their bytes."""
    whole = 0
    for old in reversed(_folders(folder)):
        if whole >= _KEPT:
            shutil.rmtree(old, ignore_errors=True)
        elif _fault(old, thorough=False) is None:
            whole += 1


def _fault(checkpoint: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint's files; their contents count only when thorough."""
    try:
        text = (checkpoint / _MANIFEST).read_text()
        manifest = json.loads(text)
        if _manifest_text(manifest) != text:
            return f"{_MANIFEST} is damaged"
        there = {_name(path, checkpoint) for path in _files(checkpoint)} - {_MANIFEST}
        if there != manifest.keys() or _STATE not in there:
            return f"files are missing or strange: {', '.join(sorted(there ^ manifest.keys()))}"
        for name, facts in manifest.items():
            size = (checkpoint / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, not {facts['bytes']}"
            if thorough and _sha256(checkpoint / name) != facts["sha256"]:
                return f"{name} is damaged"
    except _UNFIT as error:
        return f"{type(error).__name__}: {error}"
    return None


def _require_space(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    needed = int(_SPARE * sum(t.nbytes for tensors in files.values() for t in tensors.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk has {free / 2**20:,.0f} MB left and {needed / 2**20:,.0f} MB are needed"
        )


def _manifest_text(manifest: object) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _seal(folder: Path) -> None:
    """Write the manifest last and wait until everything is on the disk."""
    files = _files(folder)
    for path in files:
        _sync(path)
    manifest = {
        _name(path, folder): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    (folder / _MANIFEST).write_text(_manifest_text(manifest))
    folders = [path for path in folder.iterdir() if path.is_dir()]
    for path in (folder / _MANIFEST, *folders, folder):
        _sync(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


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
    try:
        safetensors.torch.save_file(kept, path)
    except safetensors.SafetensorError as error:  # a full disk, for one
        raise OSError(f"{path.name}: {error}") from error


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _require_same(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Names, shapes and types have to be equal: torch would stretch a tensor that is too small."""
    if own.keys() != saved.keys():
        raise ValueError(f"it lacks or adds {', '.join(sorted(own.keys() ^ saved.keys())[:3])}")
    for name, tensor in own.items():
        there, here = saved[name], tensor
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise ValueError(
                f"{name} is {tuple(there.shape)} {there.dtype} there and {tuple(here.shape)} "
                f"{here.dtype} here"
            )


def _optimization(optimization: Optimization) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimization.optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, slots in state["state"].items()
        for name, value in slots.items()
    }
    return tensors, {
        "param_groups": state["param_groups"],
        "scheduler": optimization.scheduler.state_dict(),
    }


def _empty_moment(key: str, parameters: Sequence[Tensor]) -> Tensor:
    """What a tensor of the optimizer is read into, divided as its parameter is."""
    index, name = key.split(".")
    return torch.zeros(()) if name == "step" else torch.empty_like(parameters[int(index)])


def _put_optimization(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], parts: Parts
) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    shapes = [parameter.shape for parameter in parts.llm.trained_parameters().values()]
    for key, tensor in tensors.items():
        index, name = key.split(".")
        if tensor.dim() > 0 and tensor.shape != shapes[int(index)]:
            raise ValueError(f"{key} of the optimizer is {tuple(tensor.shape)}")
        slots.setdefault(int(index), {})[name] = tensor
    optimizer, scheduler = parts.optimization.optimizer, parts.optimization.scheduler
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
    scheduler.load_state_dict(state["scheduler"])
