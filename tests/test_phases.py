"""Where the time goes."""

import json
from pathlib import Path

import pytest
import torch
from small import run, small_config

from constrained_ft import memory, phases
from constrained_ft.distributed import StopRequest
from constrained_ft.memory import (
    held_memory,
    memory_line,
    memory_words,
    peak_memory,
    spare_memory,
)
from constrained_ft.packing import Slots
from constrained_ft.parts import build_parts
from constrained_ft.phases import Phases
from constrained_ft.progress import Silent


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_tokens_and_padding_go_to_the_phase_they_fall_into() -> None:
    clock, slots = Clock(), Slots()
    watch = Phases(slots, clock)
    clock.now += 1  # before any phase
    for seconds, used, total in [(2.0, 30, 40), (3.0, 50, 60)]:
        with watch.during("update"):
            clock.now += seconds
            slots.add(used, total)
    slots.add(1000, 1000)  # of nobody
    with watch.during("scoring") as spent:
        clock.now += 4
        spent.tokens += 8

    def fail() -> None:
        with watch.during("scoring"):
            clock.now += 1
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        fail()
    found = watch.spent()
    assert list(found) == ["update", "scoring", "idle"]
    assert vars(found["update"]) == {"seconds": 5.0, "tokens": 80, "slots": 100}
    assert vars(found["scoring"]) == {"seconds": 5.0, "tokens": 8, "slots": 0}
    assert vars(found["idle"]) == {"seconds": 1.0, "tokens": 0, "slots": 0}
    columns, rows = phases.table(found)
    assert rows == [
        ["update", "5.0", "45%", "80", "16", "20.0%"],
        ["scoring", "5.0", "45%", "8", "2", "–"],
        ["idle", "1.0", "9%", "–", "–", "–"],
    ]
    assert len(columns) == 6


def test_a_run_says_where_its_time_and_memory_went(tmp_path: Path) -> None:
    folder = run(small_config("trainer=overlapped"), tmp_path / "run")
    written = json.loads(folder.phases_file.read_text())
    times = written["phases"]
    names = ["evaluation", "sampling", "scoring", "auxiliary", "target", "reference"]
    assert list(times) == [*names, "update", "samples", "checkpoint", "idle"]
    rollouts = [
        json.loads(line)
        for iteration in (1, 2)  # the last iteration learns no target, the end fits R once more
        for line in folder.rollouts_file(iteration).read_text().splitlines()
    ]
    assert times["scoring"]["tokens"] > len(rollouts)
    for name in ("evaluation", "sampling", "reference", "update"):
        assert 0 < times[name]["tokens"] <= times[name]["slots"]
    assert 0 <= times["idle"]["seconds"] < 1
    assert written["memory"]["peak_bytes"] > 2**27
    assert written["memory"]["estimated_bytes"] > 0


def test_memory_beside_its_estimate() -> None:
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    held = torch.ones(peak // 4 + 2**24)  # more than ever before
    assert peak_memory(torch.device("cpu")) > peak
    del held
    assert memory_line(2 * 2**30, 3 * 2**30) == (
        "memory: 2.0 GiB at the peak, 3.0 GiB estimated (+50%)"
    )
    assert "does not tell" in memory_line(None, 2**30)


@pytest.mark.parametrize(
    ("setting", "spare", "twice"),
    [
        ("auto", 2**20, True),
        ("auto", 2**40, False),
        ("auto", None, False),
        ("false", 2**20, False),
        ("true", 2**40, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_activations_are_computed_twice_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, setting: str, spare: int | None, *, twice: bool
) -> None:
    monkeypatch.setattr(memory, "spare_memory", lambda _: spare)
    config = small_config(f"llm.gradient_checkpointing={setting}")
    parts = build_parts(config, Silent(), StopRequest())
    assert parts.llm.checkpoints == twice
    assert memory_words(parts.llm, 2**31) == "about 2.0 GiB" + (
        ", activations computed twice" if twice else ""
    )


def test_what_a_tensor_takes_is_held_and_no_longer_spare() -> None:
    cpu = torch.device("cpu")
    held, spare = held_memory(cpu), spare_memory(cpu)
    assert held is not None
    assert spare is not None
    tensor = torch.ones(2**28)
    now = held_memory(cpu)
    assert now is not None
    assert abs(now - held - 4 * len(tensor)) < 2**28
    assert spare_memory(cpu) != spare
