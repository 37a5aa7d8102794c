"""Where the time goes."""

import json
from pathlib import Path

import pytest
from small import run, small_config

from constrained_ft import phases
from constrained_ft.packing import Slots
from constrained_ft.phases import Phases


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
    names = ["evaluation", "rehearsal", "sampling", "scoring", "auxiliary", "target", "update"]
    # In the first iteration the reference is what sampling left.
    assert list(times) == [*names, "samples", "checkpoint", "reference", "idle"]
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
