"""What a checkpoint must survive, and what it must refuse."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import run, small_config, small_parts

from constrained_ft import checkpoint
from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.checkpoint import continue_from_newest
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import CheckpointError
from constrained_ft.parts import Parts
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder
from constrained_ft.train import train


@pytest.fixture(scope="module")
def config() -> Config:
    return small_config("trainer=overlapped", "trainer.iterations=2")


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(config, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def parts(config: Config) -> Parts:
    return small_parts(config)


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> Path:
    shutil.copytree(finished.checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def resealed(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    checkpoint._seal(folder)


@pytest.mark.parametrize(
    "name", ["llm.safetensors", "auxiliary.safetensors", "optimizer.safetensors"]
)
def test_a_tensor_of_another_shape_is_refused_even_where_torch_would_stretch_it(
    name: str, copied: Path, parts: Parts, config: Config
) -> None:
    newest = copied / "iteration_0002"
    tensors = safetensors.torch.load_file(newest / name)
    key = next(key for key, tensor in tensors.items() if tensor.dim() > 1)
    tensors[key] = tensors[key][:1].clone()
    safetensors.torch.save_file(tensors, newest / name)
    resealed(newest)
    before = {n: p.clone() for n, p in parts.llm.trained_parameters().items()}
    with pytest.raises(CheckpointError, match=r"does not fit this run"):
        checkpoint.restore(newest, parts, config)
    if name != "auxiliary.safetensors":
        assert all(torch.equal(before[n], p) for n, p in parts.llm.trained_parameters().items())


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def shorten_manifest(folder: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    del tree["llm.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(tree, indent=2) + "\n")


def respace_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("  ", " \t", 1))


def add_a_file(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "state.json").read_bytes())
    content[10] ^= 1
    (folder / "state.json").write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lose_manifest,
        empty_manifest,
        shorten_manifest,
        respace_manifest,
        add_a_file,
        flip_a_bit,
    ],
)
def test_harm_is_seen_and_the_one_before_is_taken(
    harm: Callable[[Path], None], copied: Path
) -> None:
    harm(copied / "iteration_0002")
    newest, faults = checkpoint.newest(copied)
    assert newest == copied / "iteration_0001"
    assert len(faults) == 1
    assert faults[0].startswith("iteration_0002: ")


# Files that somebody made to do harm -------------------------------------------------------------


class Canary:
    """Leaves a folder behind where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place),)


def header(text: str, length: int | None = None) -> bytes:
    """A safetensors file of 64 bytes of numbers; its header may be said to be longer than it is."""
    count = len(text) if length is None else length
    return count.to_bytes(8, "little") + text.encode() + b"\0" * 64


def entry(first: int, last: int, shape: str = "[8]") -> str:
    return f'{{"dtype":"F32","shape":{shape},"data_offsets":[{first},{last}]}}'


CRAFTED = {
    "10 GB of header": header("{}", 10 * 2**30),
    "a header of 2^64 - 1 bytes": header("{}", 2**64 - 1),
    "no JSON": header("os.system('true')"),
    "a deep nest": header("[" * 100_000),
    "overlapping": header(f'{{"a":{entry(0, 32)},"b":{entry(16, 48)}}}'),
    "beyond the end": header(f'{{"a":{entry(32, 2**40, "[274877906936]")}}}'),
    "backwards": header(f'{{"a":{entry(32, 0)}}}'),
    "a shape of 2^80": header(f'{{"a":{entry(0, 64, "[1099511627776,1099511627776]")}}}'),
    "a negative shape": header(f'{{"a":{entry(0, 64, "[-4,-4]")}}}'),
    "nothing": b"",
}


@pytest.mark.parametrize("name", ["llm", "auxiliary", "optimizer", "target", "replay_0"])
@pytest.mark.parametrize("kind", [*CRAFTED, "pickle"])
def test_crafted_tensors_are_refused_and_run_nothing(
    kind: str, name: str, copied: Path, parts: Parts, config: Config, tmp_path: Path
) -> None:
    newest, canary = copied / "iteration_0002", tmp_path / "canary"
    crafted = pickle.dumps(Canary(canary)) if kind == "pickle" else CRAFTED[kind]
    (newest / f"{name}.safetensors").write_bytes(crafted)
    resealed(newest)  # its manifest says that it is whole
    assert checkpoint.newest(copied) == (newest, [])
    with pytest.raises(CheckpointError, match=rf"does not fit this run: {name}\.safetensors"):
        checkpoint.restore(newest, parts, config)
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        '{"iteration": 1e999}',
        '{"param_groups": ["x"]}',
        '{"replay": [{"prompts": 3}]}',
        '{"scheduler": {"__class__": "os"}, "replay": {}}',
    ],
)
def test_a_crafted_state_is_refused(text: str, copied: Path, parts: Parts, config: Config) -> None:
    newest = copied / "iteration_0002"
    whole = json.loads((newest / "state.json").read_text())
    crafted = text if text.startswith("[") else json.dumps(whole | json.loads(text))
    (newest / "state.json").write_text(crafted)
    resealed(newest)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.restore(newest, parts, config)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/llm.safetensors"])
def test_a_manifest_that_names_files_elsewhere_is_not_followed(
    name: str, copied: Path, tmp_path: Path
) -> None:
    newest, outside = copied / "iteration_0002", copied / "outside.safetensors"
    shutil.move(newest / "llm.safetensors", outside)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest[name] = manifest.pop("llm.safetensors")
    (newest / "manifest.json").write_text(checkpoint._manifest_text(manifest))
    found, faults = checkpoint.newest(copied)
    assert found == copied / "iteration_0001"
    assert "missing or strange" in faults[0]


def test_a_manifest_of_a_deep_nest_is_a_fault(copied: Path) -> None:
    (copied / "iteration_0002" / "manifest.json").write_text("[" * 100_000)
    assert checkpoint.newest(copied)[0] == copied / "iteration_0001"


@pytest.mark.parametrize("kind", [*CRAFTED, "pickle", "another shape", "another width"])
def test_a_crafted_auxiliary_of_an_export_is_refused(
    kind: str, finished: RunFolder, tmp_path: Path
) -> None:
    folder, canary = tmp_path / "auxiliary", tmp_path / "canary"
    shutil.copytree(finished.final_auxiliary, folder)
    (weights,) = folder.glob("*.safetensors")
    (shape,) = folder.glob("*.json")
    if kind == "pickle":
        weights.write_bytes(pickle.dumps(Canary(canary)))
    elif kind == "another shape":
        tensors = safetensors.torch.load_file(weights)
        tensors.pop("tokens_VR")
        safetensors.torch.save_file(tensors, weights)
    elif kind == "another width":
        shape.write_text(json.dumps(json.loads(shape.read_text()) | {"hidden_size": 10**12}))
    else:
        weights.write_bytes(CRAFTED[kind])
    with pytest.raises(CheckpointError, match="holds no readable auxiliary"):
        FrozenAuxiliary.load(folder, torch.device("cpu"))
    assert not canary.exists()


def test_a_run_is_never_begun_again_in_silence(
    finished: RunFolder, parts: Parts, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*--clean"):
        continue_from_newest(parts, config, folder)
    for name in ("iteration_0001", "iteration_0002"):
        shutil.copytree(finished.checkpoint(int(name[-1])), folder.checkpoints / name)
        lose_manifest(folder.checkpoints / name)
    folder.write_status("failed", iteration=0)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint"):
        continue_from_newest(parts, config, folder)


def test_a_full_disk_is_noticed_before_anything_is_written(
    copied: Path, parts: Parts, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sorted(path.name for path in copied.iterdir())
    usage = shutil.disk_usage(copied)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the disk has 0 MB left and \d+ MB are needed"):
        checkpoint.save(copied, parts, config, None, {"iteration": 3.0})
    assert sorted(path.name for path in copied.iterdir()) == there


@pytest.mark.parametrize("file", [0, 1, 2])
def test_a_disk_that_fills_up_leaves_the_earlier_ones(
    file: int, copied: Path, parts: Parts, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, count = safetensors.torch.save_file, [0]

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        count[0] += 1
        if count[0] == file + 1:
            raise OSError(28, "No space left on device")
        usual(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(copied, parts, config, None, {"iteration": 3.0})
    assert checkpoint.newest(copied) == (copied / "iteration_0002", [])
    assert not list(copied.glob(".tmp-*"))


def test_what_a_killed_process_left_is_cleared_and_a_damaged_one_is_not_counted(
    copied: Path, parts: Parts, config: Config
) -> None:
    (copied / ".tmp-iteration_0003-abc").mkdir()
    (copied / "iteration_0002" / "llm.safetensors").unlink()
    checkpoint.save(copied, parts, config, None, {"iteration": 3.0})
    # Two whole ones are kept, so the damaged one costs no whole one.
    assert sorted(path.name for path in copied.iterdir()) == [
        "iteration_0001",
        "iteration_0002",
        "iteration_0003",
    ]


def test_numbers_of_the_last_iteration_are_not_lost_when_killed_right_after_saving(
    finished: RunFolder, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    rows = folder.metrics_file.read_text().splitlines(keepends=True)
    folder.metrics_file.write_text(rows[0])
    folder.write_status("running", iteration=1)
    folder.resume(config, ["cft"])
    train(config, folder, Silent(), StopRequest())
    folder.close()
    assert folder.metrics_file.read_text().splitlines(keepends=True) == rows


def test_another_number_of_threads_is_said(finished: RunFolder, parts: Parts) -> None:
    newest = finished.checkpoint(2)
    assert checkpoint.differences(newest, parts) == []
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        (note,) = checkpoint.differences(newest, parts)
    finally:
        torch.set_num_threads(before)
    assert f"threads was {before} and is {before + 1}" in note


# Who may write -----------------------------------------------------------------------------------


def test_the_lock_names_its_holder_and_dies_with_it(config: Config, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from constrained_ft.run_folder import RunFolder, _lock\n"
        f"path = Path({str(tmp_path)!r}); held = _lock(path)\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        from constrained_ft.errors import ConfigError

        with pytest.raises(ConfigError, match=rf"process {holder.pid} on .* is writing to"):
            RunFolder(tmp_path).start(config, ["cft"])
        holder.kill()
    folder = RunFolder(tmp_path).start(config, ["cft"])
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    folder.close()


def test_a_fork_continues_with_changes_and_leaves_the_other_as_it_was(
    finished: RunFolder, config: Config, tmp_path: Path
) -> None:
    longer = small_config("trainer=overlapped", "trainer.iterations=3", "trainer.kl_weight=7")
    before = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
    folder = RunFolder(tmp_path / "fork").fork(finished, longer, ["cft", "train"])
    train(longer, folder, Silent(), StopRequest())
    folder.close()
    rows = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    theirs = [json.loads(line) for line in finished.metrics_file.read_text().splitlines()]
    assert rows[:2] == theirs
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    forked: dict[str, Any] = folder.status()["forked_from"]
    assert forked == {"folder": str(finished.path.resolve()), "iteration": 2}
    assert {path: path.read_bytes() for path in before} == before
