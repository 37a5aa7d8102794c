"""Trouble with files, for `chaos.py`: deaths inside a save, full disks, damage."""

import builtins
import errno
import hashlib
import io
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
from chaos_runs import SMALL, Broken, require


def failpoints(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Killed at every write, sync, rename and removal inside a save: a whole checkpoint remains."""
    from constrained_ft import checkpoint

    parts, config, target, folder = _trained(place, "failpoints")
    kept, point = folder.checkpoints, 0
    before = sorted(path.name for path in kept.iterdir())
    while True:
        trial = place / "failpoint"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(kept, trial)
        child = os.fork()
        if child == 0:
            _arm(point)
            checkpoint.save(trial, parts, config, target, {"iteration": 3.0})
            os._exit(0)
        _, how = os.waitpid(child, 0)
        newest, faults = checkpoint.newest(trial)
        require(newest is not None and not faults, f"failpoint {point}: {faults}")
        assert newest is not None
        require(newest.name in (before[-1], "iteration_0003"), f"failpoint {point}: {newest.name}")
        whole = [path for path in trial.glob("iteration_*") if checkpoint._fault(path) is None]
        require(len(whole) >= 2, f"failpoint {point}: {len(whole)} whole checkpoints")
        if os.waitstatus_to_exitcode(how) == 0:
            break
        point += 1
    print(
        f"failpoints: killed at each of {point} operations of a save; two whole checkpoints, and "
        "the newest is taken"
    )


def _trained(place: Path, name: str):
    """Parts, configuration and target after two iterations, and their folder, in this process."""
    from constrained_ft.checkpoint import continue_from_newest
    from constrained_ft.compose import compose
    from constrained_ft.distributed import StopRequest
    from constrained_ft.parts import build_parts
    from constrained_ft.progress import Silent
    from constrained_ft.run_folder import RunFolder
    from constrained_ft.train import train

    overrides = [one for one in SMALL if not one.startswith("constraint")]
    config = compose([*overrides, "trainer=overlapped", "trainer.iterations=2"])
    folder = RunFolder(place / name)
    if not folder.checkpoints.exists():
        folder.start(config, ["chaos"])
        train(config, folder, Silent(), StopRequest())
        folder.close()
    parts = build_parts(config, Silent(), StopRequest())
    _, target = continue_from_newest(parts, config, folder)
    return parts, config, target, folder


def _arm(point: int) -> None:
    """Kill this process at the point-th operation on files from now on."""
    import safetensors.torch

    seen = [0]

    def counted(call):
        def wrapped(*arguments, **named):
            if seen[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            return call(*arguments, **named)

        return wrapped

    for owner, names in (
        (os, ("fsync", "unlink", "rmdir", "open")),
        (Path, ("mkdir", "replace", "write_text")),
        (shutil, ("rmtree",)),
        (safetensors.torch, ("save_file",)),
    ):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def full(place: Path, count: int, kinds: Sequence[str]) -> None:
    """From some write of a run on, the disk is full or read-only: said so, and nothing is lost."""
    from constrained_ft import checkpoint

    straight = place / "full-straight"
    writes, _ = _child(straight, None, 0)[2]
    expected = _weights(straight)
    for number in (errno.ENOSPC, errno.EROFS):
        codes: Counter[int] = Counter()
        # The first writes are those of a start; no checkpoint is there yet.
        points = sorted({round(i * (writes - 1) / max(count - 1, 1)) for i in range(count)})
        for point in points:
            folder = place / "full"
            shutil.rmtree(folder, ignore_errors=True)
            code, said, (_, failed) = _child(folder, number, point)
            if failed == 0:  # what came after it takes no room
                require(code == 0 and _weights(folder) == expected, said)
                continue
            codes[code] += 1
            words = f"{os.strerror(number)}, write {point}: {code}, {said[-1000:]}"
            require(code in (2, 3) and os.strerror(number) in said, words)
            require("Traceback" not in said and "unexpected" not in said, words)
            saved = sorted(folder.glob("checkpoints/iteration_*"))
            if not saved:
                continue
            newest, faults = checkpoint.newest(folder / "checkpoints")
            require(newest == saved[-1] and not faults, f"{words}: {faults}")
            require(len(saved) >= 2 or newest.name <= "iteration_0001", f"{words}: one is left")
            code, said, _ = _child(folder, None, 0)
            require(code == 0 and _weights(folder) == expected, f"{words}: resumed: {said[-1000:]}")
        told = ", ".join(f"exit code {code} {n} times" for code, n in sorted(codes.items()))
        print(
            f"full: {os.strerror(number)!r} from {codes.total()} of {writes} writes of a run on: "
            f"{told}, the reason said; continued, the same weights"
        )


def _weights(folder: Path) -> str:
    """Of the final model."""
    return hashlib.sha256((folder / "final/llm/model.safetensors").read_bytes()).hexdigest()


def _child(folder: Path, number: int | None, point: int) -> tuple[int, str, list[int]]:
    """A run in a fork of this process: its exit code, what it said, its writes, those that failed.

    Args:
        folder: of the run, which is continued where it has begun.
        number: the error of every write from some point on; None for none.
        point: writes before it.
    """
    from constrained_ft.cli.main import main
    from constrained_ft.train import train  # noqa: F401  # loaded once, for all children

    said, wrote = folder.with_suffix(".said"), folder.with_suffix(".wrote")
    child = os.fork()
    if child == 0:
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        disk = _Disk(folder, number, point)
        disk.install()
        begun = (folder / "checkpoints").exists()
        overrides = [one for one in SMALL if not one.startswith("constraint")]
        where = ["--resume", str(folder)] if begun else [*overrides, f"output_dir={folder}"]
        again = [] if begun else ["trainer.iterations=3", "--clean"]
        code = 1
        try:
            main(["--no-color", "train", *where, *again, "--nproc-per-node", "1"])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            descriptor = os.open(wrote, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, f"{disk.seen} {disk.failed}".encode())
            os._exit(code)
    _, how = os.waitpid(child, 0)
    return (
        os.waitstatus_to_exitcode(how),
        said.read_text(),
        [int(n) for n in wrote.read_text().split()],
    )


class _Disk:
    """Counts the writes below a folder, and lets them fail from some point on."""

    def __init__(self, folder: Path, number: int | None, point: int) -> None:
        self._below, self._number, self._point = f"{folder}{os.sep}", number, point
        self.seen, self.failed = 0, 0

    def install(self) -> None:
        """Take the place of what Python and safetensors write with."""
        import safetensors.torch

        self._open, self._serialize = io.open, safetensors.torch.serialize_file
        io.open = builtins.open = self._opened
        safetensors.torch.serialize_file = self._tensors
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, self._guarded(name, getattr(os, name)))

    def _fails(self, path: object, *, takes_room: bool = True) -> bool:
        if not str(path).startswith(self._below):
            return False
        self.seen += 1
        wanted = self._number is not None and self.seen > self._point
        wanted = wanted and (takes_room or self._number == errno.EROFS)
        self.failed += wanted
        return wanted

    def _error(self, path: object) -> OSError:
        assert self._number is not None
        return OSError(self._number, os.strerror(self._number), str(path))

    def _guarded(self, name: str, usual: Callable[..., object]) -> Callable[..., object]:
        def call(path: object, *arguments: object, **named: object) -> object:
            if self._fails(path, takes_room=name == "mkdir"):
                raise self._error(path)
            return usual(path, *arguments, **named)

        return call

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not self._fails(file):
            return self._open(file, mode, *arguments, **named)
        if self._number == errno.EROFS:
            raise self._error(file)
        self._open(file, mode, *arguments, **named).close()  # its name needs no room
        return self._open("/dev/full", mode.replace("x", "w"), *arguments, **named)

    def _tensors(self, data: object, path: Any, *arguments: object, **named: object) -> None:
        if not self._fails(path):
            self._serialize(data, path, *arguments, **named)
            return
        if self._number == errno.ENOSPC:
            Path(path).touch()
        text = f"I/O error: {self._error(path).strerror} (os error {self._number})"
        raise safetensors.SafetensorError(f"Error while serializing: {text}")


def corrupt(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Damaged files are noticed before a step is taken, and the checkpoint before is taken."""
    from constrained_ft import checkpoint
    from constrained_ft.errors import CheckpointError

    parts, config, _, folder = _trained(place, "corrupt")
    chance, found = random.Random(3), Counter()
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    for number in range(count):
        trial = place / "corrupted"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(folder.checkpoints, trial)
        kind = _damage(trial / names[-1], chance)
        newest, faults = checkpoint.newest(trial)
        if newest is not None and newest.name == names[-1]:  # its manifest says that it is whole
            try:
                checkpoint.restore(newest, parts, config)
            except CheckpointError:
                found[kind] += 1
                continue
            raise Broken(f"corruption {number} ({kind}) was not noticed")
        require(newest is not None and newest.name == names[-2] and len(faults) == 1, str(faults))
        found[kind] += 1
    kinds_found = ", ".join(f"{number} x {kind}" for kind, number in sorted(found.items()))
    print(f"corrupt: {found.total()} of {count} noticed before a step ({kinds_found})")


def _damage(checkpoint: Path, chance: random.Random) -> str:
    """Do one of several kinds of harm to a checkpoint; returns its name."""
    import safetensors.torch

    from constrained_ft.checkpoint import _seal

    files = sorted(checkpoint.iterdir())
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    match chance.randrange(5):
        case 0 | 1:
            place = chance.randrange(len(content))
            content[place] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
            return "a flipped bit"
        case 2:
            file.write_bytes(content[: chance.randrange(len(content))])
            return "a file cut short"
        case 3:
            file.unlink()
            return "a missing file"
        case _:
            # A whole checkpoint of something else: the manifest fits, the tensors do not.
            chosen = checkpoint / chance.choice(["llm", "auxiliary"])
            chosen = chosen.with_suffix(".safetensors")
            tensors = safetensors.torch.load_file(chosen)
            name = chance.choice([n for n, t in tensors.items() if t.dim() > 0])
            import torch

            whole = tensors[name]
            tensors[name] = whole[:1].clone() if len(whole) > 1 else torch.cat([whole, whole])
            safetensors.torch.save_file(tensors, chosen)
            (checkpoint / "manifest.json").unlink()
            _seal(checkpoint)
            return "a tensor of another shape"
