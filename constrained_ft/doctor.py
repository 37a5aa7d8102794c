"""What `cft doctor` looks at: versions, devices, memory, disk, the cache, extras.

It says whether a login is there, never what it is; of the environment a few variables that change
how a run goes, and no other; and a home folder is `~`.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import get_token
from packaging.requirements import Requirement

from constrained_ft.distributed import default_device, multiplies_bf16_fast
from constrained_ft.machine import processor
from constrained_ft.memory import spare_memory
from constrained_ft.resources import cache_dir

PACKAGE = "constrained-ft"
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS", "XDG_CACHE_HOME"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
)
_FREE_BYTES = 3 * 10**9  # a model, its checkpoints and its export, of the default run
_MEMORY_BYTES = 3 * 10**9


@dataclass(frozen=True, kw_only=True)
class Health:
    """What was found."""

    facts: Mapping[str, Mapping[str, str]]
    """Names and values, by heading."""
    problems: tuple[str, ...]
    """What keeps cft from working, each with what to do; none is best."""


def examine() -> Health:
    """Look at this machine and installation; nothing is fetched and nothing is written."""
    required, extras = _requirements(metadata.requires(PACKAGE) or [])
    problems = [f"{fault}; pip install '{one}'" for one in required if (fault := _fault(one))]
    device = default_device()
    return Health(
        facts={
            "versions": _versions(required),
            "machine": _machine(device),
            "disk": _disk(),
            "extras": {name: _extra(name, parts) for name, parts in extras.items()},
            "settings": _settings(),
        },
        problems=(*problems, *_shortages(device)),
    )


def _requirements(
    lines: Iterable[str],
) -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What is needed always, and what each extra adds, without extras of extras."""
    required: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for one in map(Requirement, lines):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            required.append(one)
            continue
        name = str(one.marker).partition("extra ==")[2].strip().strip("\"'")
        extras.setdefault(name, [])
        if one.name != PACKAGE:
            extras[name].append(one)
    return required, {name: parts for name, parts in extras.items() if parts}


def _fault(requirement: Requirement) -> str | None:
    """Why a requirement is not met; None where it is."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, and has to be {requirement.specifier}"


def _extra(name: str, parts: Iterable[Requirement]) -> str:
    faults = [fault for one in parts if (fault := _fault(one)) is not None]
    if not faults:
        return "installed"
    return f"pip install '{PACKAGE}[{name}]' ({', '.join(faults)})"


def _versions(required: Iterable[Requirement]) -> dict[str, str]:
    found = {"cft": metadata.version(PACKAGE), "python": sys.version.split()[0]}
    for one in required:
        if _fault(one) is None:
            found[one.name] = metadata.version(one.name)
    return found


def _machine(device: torch.device) -> dict[str, str]:
    facts = {
        "system": platform.platform(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "device": str(device),
    }
    for index in range(torch.accelerator.device_count()):
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(index)
            size = f"{properties.total_memory / 2**30:.0f} GiB"
            facts[f"GPU {index}"] = f"{properties.name}, {size}, CUDA {torch.version.cuda}"
        else:
            facts[f"accelerator {index}"] = device.type
    facts["fast bfloat16"] = "yes" if multiplies_bf16_fast(device) else "no; float32 is used"
    spare = spare_memory(device)
    facts["spare memory"] = "unknown" if spare is None else f"{spare / 2**30:.1f} GiB"
    return facts


def _disk() -> dict[str, str]:
    cache = cache_dir()
    held = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    state = f"{held / 1e9:.2f} GB" if cache.is_dir() else "empty"
    return {
        "this folder": f"{_free(Path.cwd()) / 1e9:.1f} GB free",
        "cache": f"{_short(cache)}, {state}, {_free(cache) / 1e9:.1f} GB free",
    }


def _settings() -> dict[str, str]:
    given = {name: _short(Path(os.environ[name])) for name in _VARIABLES if os.environ.get(name)}
    return {"hub login": "yes" if get_token() else "no, and public models need none"} | given


def _shortages(device: torch.device) -> list[str]:
    found = []
    for name, place in (("this folder", Path.cwd()), ("the cache", cache_dir())):
        if _free(place) < _FREE_BYTES:
            found.append(
                f"{name} has {_free(place) / 1e9:.1f} GB free, a run needs some "
                f"{_FREE_BYTES / 1e9:.0f}; make room, with `cft runs prune --keep N` for one"
            )
        if not os.access(_existing(place), os.W_OK):
            found.append(
                f"{name} ({_short(place)}) cannot be written; "
                + (
                    "go to another folder, or give output_dir=PATH"
                    if place == Path.cwd()
                    else "set XDG_CACHE_HOME to one that can"
                )
            )
    spare = spare_memory(device)
    if spare is not None and spare < _MEMORY_BYTES:
        found.append(
            f"{spare / 2**30:.1f} GiB of memory are free; end other programs, or use a smaller "
            "trainer.per_device_train_batch_size"
        )
    return found


def _free(place: Path) -> int:
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    return next(one for one in (place, *place.parents) if one.exists())


def _short(path: Path) -> str:
    """A path without the name of its owner."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
