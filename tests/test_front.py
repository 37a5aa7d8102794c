"""What a sweep came to: the runs that no other beats, and the best of them."""

import json
from pathlib import Path

import pytest

from constrained_ft import front


def write(
    folder: Path, job: str, satisfied: float, perplexity: float, *, done: bool = True
) -> None:
    def model(share: float, cost: float) -> dict[str, object]:
        group = {"mean": share, "low": share - 0.02, "high": share + 0.02}
        return {
            "groups": {
                "a": {"samples": 30, "satisfaction": group},
                "b": {"samples": 10, "satisfaction": group | {"mean": share - 0.04}},
            },
            "perplexity": {"news": {"mean": cost}, "toxic": {"mean": 9.0}},
        }

    (folder / job).mkdir(parents=True, exist_ok=True)
    models = [model(0.5, 40.0), model(satisfied, perplexity)][: 2 if done else 1]
    (folder / job / "evaluation.json").write_text(json.dumps({"models": models}))


def test_the_front_and_the_best(tmp_path: Path) -> None:
    write(tmp_path, "0", 0.80, 20.0)
    write(tmp_path, "1", 0.95, 22.0)
    write(tmp_path, "2", 0.94, 25.0)  # beaten by 1
    write(tmp_path, "3", 0.99, 30.0)
    write(tmp_path, "4", 1.00, 10.0, done=False)
    jobs = {job: (f"seed={job}", tmp_path / job) for job in "012345"}
    points = front.read_points(jobs)
    assert [point.job for point in points] == ["0", "1", "2", "3"]
    assert [point.job for point in points if point.on_front] == ["0", "1", "3"]
    # Groups count by their completions.
    assert points[0].satisfaction == pytest.approx((30 * 0.80 + 10 * 0.76) / 40)
    chosen = front.best(points, 0.9)
    assert chosen is not None
    assert chosen.job == "1"
    assert front.best(points, 0.999) is None
    columns, rows = front.table(points)
    assert columns == [
        "job",
        "overrides",
        "satisfied",
        "perplexity, news",
        "perplexity, toxic",
        "front",
    ]
    assert [row[0] for row in rows] == ["3", "1", "2", "0"]
    assert [row[-1] for row in rows] == ["yes", "yes", "", "yes"]
    front.save(tmp_path, points, {"0": 0, "5": 3})
    tree = json.loads((tmp_path / "sweep.json").read_text())
    assert tree["exit_codes"] == {"0": 0, "5": 3}
    assert tree["runs"][1]["on_front"] is True
    assert front.plot(tmp_path / "front.png", points)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_equal_runs_do_not_beat_each_other(tmp_path: Path) -> None:
    for job in "01":
        write(tmp_path, job, 0.9, 20.0)
    points = front.read_points({job: ("", tmp_path / job) for job in "01"})
    assert all(point.on_front for point in points)


def test_runs_of_several_seeds_are_one_point(tmp_path: Path) -> None:
    for job, share, cost in (("0", 0.8, 20.0), ("1", 0.9, 24.0), ("2", 0.5, 30.0)):
        write(tmp_path, job, share, cost)
    asked = {"0": "a=1 seed=0", "1": "a=1 seed=1", "2": "a=2 seed=0"}
    runs = front.read_points({job: (text, tmp_path / job) for job, text in asked.items()})
    first, second = front.over_seeds(runs)
    assert (first.job, first.overrides) == ("0, 1", "a=1 (2 seeds)")
    assert first.satisfaction == pytest.approx(0.84)  # 0.79 and 0.89: a quarter has 0.04 less
    spread = 0.1 / 2**0.5  # of two values: their distance over the root of two
    assert (first.low, first.high) == pytest.approx((0.84 - spread, 0.84 + spread))
    assert first.perplexity["news"] == pytest.approx(22.0)
    assert first.on_front
    assert (second.job, second.overrides, second.on_front) == ("2", asked["2"], False)
    assert front.over_seeds(runs[1:]) == runs[1:]  # one seed each: the runs themselves
    assert front.plot(tmp_path / "front.png", [first, second])
