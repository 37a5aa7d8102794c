"""Several processes at one piece of work: who they are, when they stop, what they exchange.

Ranks agree before every exchange. Each says in the store that it has come, and waits for the others
to come too; one that fails says so there instead. So an error on one rank, wherever it happens,
reaches all others before they would wait for it in vain, and nothing hangs. The exchange itself,
once all have come, cannot fail for any other reason than that a process dies.

The payload of gradients goes over the device's own group (NCCL on CUDA, gloo on CPUs), everything
else over gloo. Sums are taken in the same order on every rank, so all end with the same bits.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # not in __all__
from torch.distributed.rendezvous import rendezvous

from constrained_ft.errors import CftError, Interrupted, PeerError, error_named
from constrained_ft.heartbeat import Heartbeat

_FAILURE = "failure"
_GO, _STOP = "go", "stop"
_POLL_SECONDS = 0.5  # between two looks at what other ranks say, while this one works
_MESSAGE_BYTES = 2**25
_PAUSE = 0.0002  # between two looks while it waits; grows up to a hundred times that

Shared = TypeVar("Shared", bound=Sequence[Any] | Tensor)


def default_device() -> torch.device:
    """This process's accelerator, or the CPU.

    Not Apple's, which has no float64: tokens are drawn by sums in it.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type == "mps":
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def wants_bf16(precision: str, *, tiny: bool) -> bool:
    """Whether a trunk multiplies in bfloat16.

    Args:
        precision: `trainer.precision`.
        tiny: of a model so small that its arithmetic costs nothing.
    """
    return precision == "bf16" or (
        precision == "auto" and not tiny and multiplies_bf16_fast(default_device())
    )


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


class StopRequest:
    """Remembers SIGINT, SIGTERM and SIGUSR1 until a loop asks.

    The first signal sets a flag, which `check` turns into `Interrupted` at a safe place, and says
    so on standard error; the second leaves at once with exit code 130. Where several processes work
    together, `check` also raises what another one announced.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._links: _Links | None = None
        self._looked = 0.0

    def install(self) -> None:
        """Take over the signals; only possible in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(130)
        self._signal = number
        # The handler may run in the middle of another write, so no buffered stream is used.
        with suppress(OSError):
            os.write(2, b"\nstopping at the next safe point; again to leave at once\n")

    def listen(self, links: "_Links") -> None:
        """Also look at what the other ranks say."""
        self._links = links

    def check(self) -> None:
        """Raise if a signal came, or if another rank failed.

        Raises:
            Interrupted: naming the signal.
            CftError: what the other rank announced, with its rank.
        """
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(f"stopped by {name}; nothing finished is lost")
        now = time.monotonic()
        if self._links is not None and now - self._looked > _POLL_SECONDS:
            self._looked = now
            self._links.raise_failure()


@dataclass(kw_only=True)
class _Links:
    """What connects a rank to all others."""

    store: Store
    stop: StopRequest
    rank: int
    timeout: float
    """Seconds to wait for others."""
    heartbeat: Heartbeat
    stuck: bool = False
    """Whether an exchange stands open that will never end."""

    def raise_failure(self) -> None:
        """Raise what another rank announced, if one did."""
        if not self.store.check([_FAILURE]):
            return
        said = json.loads(self.store.get(_FAILURE))
        if said["rank"] == self.rank:
            return
        text = str(said["text"])
        if said["kind"] != Interrupted.__name__:
            text = f"rank {said['rank']}: {text}"
        raise error_named(said["kind"], text)


class World:
    """The processes that share a piece of work; `World.alone()` is this process and no other."""

    def __init__(self, ranks: Sequence[int], rank: int, links: _Links | None, name: str) -> None:
        """Made by `alone`, `join` and `among`.

        Args:
            ranks: of all that take part, as the launcher counts them.
            rank: this process's, one of them.
            links: None where it is alone.
            name: differs between groups of the same processes.
        """
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)
        self.size = len(self.ranks)
        self._links = links if self.size > 1 else None
        self._all = links
        self._name = name
        self._met = 0
        self._bulk: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None

    @classmethod
    def alone(cls) -> "World":
        """This process and no other."""
        return cls((0,), 0, None, "alone")

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def among(self, groups: Mapping[str, Sequence[int]]) -> "dict[str, World]":
        """Groups of some ranks. Every rank makes them all, in one order; a rank gets its own."""
        found = {}
        for name, ranks in groups.items():
            whole = [self.ranks[rank] for rank in ranks]
            bulk, control = _groups(whole)
            if self.ranks[self.rank] in whole:
                world = World(whole, self.ranks[self.rank], self._all, name)
                world._bulk, world._control = bulk, control
                found[name] = world
        return found

    @property
    def bulk_group(self) -> dist.ProcessGroup:
        """torch's own group of these ranks, who are several, for weights and gradients."""
        assert self._bulk is not None
        return self._bulk

    @property
    def control_group(self) -> dist.ProcessGroup:
        """The same for everything else, over gloo."""
        assert self._control is not None
        return self._control

    def begin(self, phase: str) -> None:
        """Say what this rank does from now on: others name it if nothing is heard any more."""
        if self._all is not None:
            self._all.heartbeat.begin(phase)

    def leave(self) -> None:
        """Close the connections to the other processes, but for an exchange that stands open."""
        if self._all is not None:
            self._all.heartbeat.stop()
        if dist.is_initialized() and not (self._all is not None and self._all.stuck):
            dist.destroy_process_group()

    def share(self, items: Shared) -> Shared:
        """This rank's part of some work, perhaps none: every size-th item, from its rank on."""
        return items[self.rank :: self.size]  # type: ignore[return-value]  # a slice is of its type

    def agree(self) -> None:
        """Wait until all ranks are here.

        Raises:
            Interrupted: if a signal came to this rank or to another one.
            CftError: what another rank failed with.
            PeerError: if a rank does not come in time, or is lost.
        """
        links = self._links
        if links is None:
            return
        self._met += 1
        try:
            links.stop.check()
            self._meet(links, f"{self._name}/{self._met}")
        except RuntimeError as error:
            raise PeerError(f"the connection to the other ranks is lost: {error}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that torch exchanges in by itself: all begin it together.

        Raises:
            CftError: what another rank failed with meanwhile, as far as it could still say so.
        """
        self.agree()
        try:
            yield
        except RuntimeError:
            if self._links is not None:
                self._links.raise_failure()
            raise

    def _meet(self, links: _Links, place: str) -> None:
        """One word decides for all: `go` of the last to come, or `stop` of one that leaves."""
        store, verdict = links.store, f"{place}/verdict"
        store.set(f"{place}/{self.rank}", "")
        if store.add(place, 1) == self.size:
            said = store.compare_set(verdict, "", _GO)
        else:
            said = self._await(links, place, verdict)
        if said != _GO.encode():
            self._await_reason(links)
        if self.leads and self._met > 2:  # all have left the last but one
            old = f"{self._name}/{self._met - 2}"
            for key in (old, f"{old}/verdict", *(f"{old}/{rank}" for rank in range(self.size))):
                store.delete_key(key)

    def _await(self, links: _Links, place: str, verdict: str) -> bytes:
        """The verdict; a rank that would leave first asks whether it still may."""
        store, started, pause = links.store, time.monotonic(), _PAUSE
        looked = started
        while not store.check([verdict]):
            time.sleep(pause)
            pause = min(pause * 1.2, 100 * _PAUSE)
            try:
                links.raise_failure()
                links.stop.check()
                now = time.monotonic()
                if now - looked > _POLL_SECONDS:
                    looked = now
                    self._require_life(links, place)
                if now - started > links.timeout:
                    missing = ", ".join(str(rank) for rank in self._missing(links, place))
                    raise PeerError(
                        f"rank {missing} did not come within {links.timeout:g} s "
                        "(placement.timeout)"
                    )
            except CftError:
                if store.compare_set(verdict, "", _STOP) == _GO.encode():
                    break  # the others are on their way already; the next look will tell again
                raise
        return store.get(verdict)

    def _missing(self, links: _Links, place: str) -> list[int]:
        """The ranks, as the launcher counts them, that have not come yet."""
        return [
            self.ranks[rank]
            for rank in range(self.size)
            if not links.store.check([f"{place}/{rank}"])
        ]

    def _require_life(self, links: _Links, place: str) -> None:
        frozen = links.heartbeat.frozen(self._missing(links, place), links.timeout)
        if frozen is not None:
            raise PeerError(frozen)

    def _await_reason(self, links: _Links) -> None:
        """Raise what the rank that left is about to announce."""
        started = time.monotonic()
        while time.monotonic() - started < links.timeout:
            links.raise_failure()
            links.stop.check()
            time.sleep(_PAUSE)
        raise PeerError("another rank left without a word")

    def announce(self, error: BaseException) -> None:
        """Tell all other ranks why this one leaves; the first to speak is heard."""
        if self._all is None:
            return
        text = str(error) if isinstance(error, CftError) else f"{type(error).__name__}: {error}"
        said = {"rank": self._all.rank, "kind": type(error).__name__, "text": text}
        with suppress(RuntimeError):  # the store may be gone: so are the others
            if not self._all.store.check([_FAILURE]):
                self._all.store.set(_FAILURE, json.dumps(said))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the sum over all ranks, on the tensors' device."""
        if self._links is None:
            return
        self.agree()
        for flat, parts in _flattened(tensors):
            self._exchange("summing gradients", dist.all_reduce, flat, group=self._bulk)
            for part, summed in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over all ranks; one that nothing touched here is zero."""
        found = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        self.add(found)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sum over all ranks of each number, in float64."""
        if self._links is None:
            return list(numbers)
        self.agree()
        sums = torch.tensor(list(numbers), dtype=torch.float64)
        self._exchange("summing", dist.all_reduce, sums, group=self._control)
        return [float(number) for number in sums]

    def copy(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Give every rank the values of `source`'s tensors."""
        if self._links is None:
            return
        self.agree()
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self._exchange(
                "copying weights",
                dist.broadcast,
                whole,
                src=self.ranks[source],
                group=self._bulk,
            )
            if self.rank != source:
                tensor.detach().copy_(whole)

    def gather(self, packet: bytes) -> list[bytes]:
        """What every rank gave, by rank."""
        if self._links is None:
            return [packet]
        self.agree()
        sizes = [torch.zeros(1, dtype=torch.long) for _ in self.ranks]
        own = torch.frombuffer(bytearray(packet), dtype=torch.uint8)
        told = torch.tensor([len(packet)])
        self._exchange("gathering", dist.all_gather, sizes, told, group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.zeros_like(padded) for _ in self.ranks]
        self._exchange("gathering", dist.all_gather, found, padded, group=self._control)
        return [
            part[: int(size)].numpy().tobytes() for part, size in zip(found, sizes, strict=True)
        ]

    def tell(self, packet: bytes, source: int = 0) -> bytes:
        """`source`'s packet; what the others give is not read."""
        if self._links is None:
            return packet
        self.agree()
        size = torch.tensor([len(packet)])
        where = {"src": self.ranks[source], "group": self._control}
        self._exchange("telling", dist.broadcast, size, **where)
        if self.rank == source:
            whole = torch.frombuffer(bytearray(packet), dtype=torch.uint8)
        else:
            whole = torch.zeros(int(size), dtype=torch.uint8)
        self._exchange("telling", dist.broadcast, whole, **where)
        return whole.numpy().tobytes()

    def _exchange(self, doing: str, begin: Callable[..., Any], *tensors: Any, **where: Any) -> None:
        """A collective that all ranks have agreed on. Whoever freezes within it is named, too.

        Raises:
            PeerError: saying what was being done.
        """
        links = self._links
        assert links is not None
        try:
            work = begin(*tensors, **where, async_op=True)
            if dist.get_backend(where["group"]) == "gloo":
                self._await_end(work, links)
            else:  # NCCL's end on the device, not here
                work.wait()
        except RuntimeError as error:
            raise PeerError(f"a rank was lost while {doing}: {error}") from error

    def _await_end(self, work: dist.Work, links: _Links) -> None:
        others = [rank for place, rank in enumerate(self.ranks) if place != self.rank]
        while True:
            try:
                work.wait(timedelta(seconds=_POLL_SECONDS))
                return
            except RuntimeError:
                if work.is_completed():  # it has failed, and not only taken longer
                    raise
            frozen = links.heartbeat.frozen(others, links.timeout)
            if frozen is not None:
                links.stuck = True
                raise PeerError(frozen)


def join(stop: StopRequest, timeout: float, silence: float) -> World:
    """All processes that torchrun started, this one among them.

    Args:
        stop: polled while this rank waits for others.
        timeout: seconds to wait for others.
        silence: seconds without a sign of life after which a rank counts as frozen.
    """
    device = "cpu"
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = default_device().type
    found, rank, size = next(rendezvous("env://"))
    # A launcher that starts the processes again may keep the store.
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)
    store.set_timeout(timedelta(seconds=timeout))
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    own = PrefixStore("cft", store)
    heartbeat = Heartbeat(own, rank, silence)
    links = _Links(store=own, stop=stop, rank=rank, timeout=timeout, heartbeat=heartbeat)
    stop.listen(links)
    heartbeat.start()
    world = World(range(size), rank, links, "all")
    world._bulk, world._control = _groups(range(size))
    return world


def pack(tensors: Mapping[str, Tensor], facts: object) -> bytes:
    """Tensors and JSON in one packet; nothing that is read back can run code."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(kept, metadata={"facts": json.dumps(facts)})


def unpack(packet: bytes) -> tuple[dict[str, Tensor], object]:
    """What `pack` was given."""
    length = int.from_bytes(packet[:8], "little")
    header = json.loads(packet[8 : 8 + length])
    return safetensors.torch.load(packet), json.loads(header["__metadata__"]["facts"])


def _groups(ranks: Iterable[int]) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """One group for gradients and weights, one for everything else."""
    members = list(ranks)
    bulk, control = dist.new_group(members), dist.new_group(members, backend="gloo")
    return bulk, control


def _flattened(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Tensors of one type side by side, some tens of megabytes in one message."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for parts in by_type.values():
        while parts:
            count, size = 0, 0
            while count < len(parts) and (count == 0 or size < _MESSAGE_BYTES):
                size += parts[count].nbytes
                count += 1
            yield torch.cat([part.reshape(-1) for part in parts[:count]]), parts[:count]
            parts = parts[count:]
