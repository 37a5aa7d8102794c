"""Several processes for tests: a function of a test module, run by ranks that meet over gloo."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

import torch

from constrained_ft.distributed import StopRequest, World, join

PATIENCE = 120.0
# Ranks are forked from a process that has loaded the libraries, once for all tests.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["constrained_ft.train", "constrained_ft.selfcheck"])


def together(work: Callable[..., object], size: int, *arguments: object) -> list[Any]:
    """What `work(world, stop, *arguments)` returns or raises on each rank, by rank."""
    ranks, results = _start(work, size, arguments)
    found = dict(results.get(timeout=PATIENCE) for _ in ranks)
    for process in ranks:
        process.join(PATIENCE)
    return [pickle.loads(found[rank]) for rank in range(size)]


def started(work: Callable[..., object], size: int, *arguments: object) -> list[int | None]:
    """The same for ranks that may be killed: their exit codes, by rank."""
    ranks, _ = _start(work, size, arguments)
    for process in ranks:
        process.join(PATIENCE)
    return [process.exitcode for process in ranks]


def _start(
    work: Callable[..., object], size: int, arguments: tuple[object, ...]
) -> tuple[list[Any], Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = RANKS.Queue()
    ranks = [
        RANKS.Process(target=_enter, args=(work, rank, size, port, arguments, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks, results


def _enter(
    work: Callable[..., object],
    rank: int,
    size: int,
    port: int,
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    stop = StopRequest()
    stop.install()
    world: World = join(stop, PATIENCE, PATIENCE)
    try:
        value = work(world, stop, *arguments)
    except BaseException as error:  # the parent judges it
        world.announce(error)
        value = error
    # As bytes: torch would share tensors through this process, which is about to end.
    results.put((rank, pickle.dumps(value)))
    # The first rank keeps the store: it leaves last.
    if rank == 0:
        results.close()
        results.join_thread()
    world.leave()
