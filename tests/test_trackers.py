"""Trackers: what each tool's own files hold afterwards, and that none of them stops a run.

Tools that are not installed are skipped: `pip install -e '.[track]'` has them all.
"""

import json
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from small import small_config

from constrained_ft import metrics, trackers
from constrained_ft.cli.main import main
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ExtraError, Interrupted
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder
from constrained_ft.trackers import Tool, require_installed, tracked
from constrained_ft.train import train

KINDS = ("tensorboard", "trackio", "wandb", "mlflow")
RESULTS = {
    "result/base/a/satisfaction": 0.5,
    "result/base/a/score": 0.5625,
    "result/base/a/violation_judge": 0.25,
    "result/base/perplexity/news": 40.0,
    "result/tuned/a/satisfaction": 0.875,
    "result/tuned/a/score": 0.9375,
    "result/tuned/a/violation_judge": 0.125,
    "result/tuned/perplexity/news": 20.0,
    "result/tuned/kl_to_base": 0.0625,
}


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def needs(kind: str) -> pytest.MarkDecorator:
    reason = f"{kind} is not installed; pip install {kind}"
    return pytest.mark.skipif(find_spec(kind) is None, reason=reason)


def write_row(folder: RunFolder, iteration: int) -> None:
    # Binary fractions, so that a tool which keeps single precision keeps them exactly.
    row = {"iteration": float(iteration), "update/kl": 0.5**iteration, "term/x/score": 0.25}
    metrics.append(folder.metrics_file, row)


def write_results(folder: RunFolder) -> None:
    def model(name: str, share: float, judged: float, cost: float, kl: float | None) -> object:
        group = {
            "satisfaction": {"mean": share},
            "score": {"mean": share + 0.0625},
            "judges": {"judge": {"mean": judged}},
        }
        return {
            "model": name,
            "groups": {"a": group},
            "perplexity": {"news": {"mean": cost}},
            "kl_to_base": kl,
        }

    models = [model("base", 0.5, 0.25, 40.0, None), model("tuned", 0.875, 0.125, 20.0, 0.0625)]
    folder.evaluation_file.write_text(json.dumps({"models": models}))


def stop_after(
    config: Config, folder: RunFolder, display: Notes, error: BaseException, *, iterations: int
) -> None:
    with tracked(config, folder, display) as tracker:
        for iteration in range(1, iterations + 1):
            write_row(folder, iteration)
            tracker.iteration(iteration, 4, {})
        raise error


def interrupted_and_resumed(
    kind: str, path: Path, *, pause: float = 0.0
) -> tuple[RunFolder, list[str]]:
    """Two iterations, a stop, two more, the results; and what people were told."""
    config = small_config(f"tracker={kind}", "tracker.project=mine", "tracker.name=first")
    folder, display = RunFolder(path / "run"), Notes()
    folder.path.mkdir()
    with pytest.raises(Interrupted):
        stop_after(config, folder, display, Interrupted("stopped by a test"), iterations=2)
    # Killed between a row and the tracker, which gets it when the run is resumed.
    write_row(folder, 3)
    time.sleep(pause)
    with tracked(config, folder, display) as tracker:
        write_row(folder, 4)
        tracker.iteration(4, 4, {})
        write_results(folder)
    return folder, display.notes


Curves = dict[str, list[tuple[int, float]]]


def assert_complete(curves: Curves) -> None:
    """Every iteration once, under its number."""
    assert sorted(curves["update/kl"]) == [(i, 0.5**i) for i in (1, 2, 3, 4)]
    assert sorted(curves["term/x/score"]) == [(i, 0.25) for i in (1, 2, 3, 4)]
    assert "iteration" not in curves


# What the tools keep ------------------------------------------------------------------------------


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_its_event_files_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, notes = interrupted_and_resumed("tensorboard", tmp_path)
    events = EventAccumulator(str(folder.tracker)).Reload()
    curves = {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert_complete(curves)
    found = {name: points[0] for name, points in curves.items() if name.startswith("result/")}
    assert found == {name: (4, value) for name, value in RESULTS.items()}
    (text,) = events.Tensors("config/text_summary")
    assert b"name: smoke" in text.tensor_proto.string_val[0]
    assert notes == [f"tracker: tensorboard --logdir {folder.tracker}"] * 2


@needs("trackio")
@pytest.mark.filterwarnings("ignore")
def test_trackio_has_one_run_in_its_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert "trackio" not in sys.modules  # it reads the folder once
    folder, notes = interrupted_and_resumed("trackio", tmp_path)
    name = json.loads((folder.tracker / "run.json").read_text())["id"]
    assert name.startswith("first-")
    assert notes == [f"tracker: trackio show --project mine, run {name}"] * 2
    assert "Trackio" not in capsys.readouterr().out
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        configs = database.execute("select config from configs").fetchall()
    curves: Curves = {}
    for run, step, text in rows:
        assert run == name
        for key, value in json.loads(text).items():
            curves.setdefault(key, []).append((step, value))
    assert_complete(curves)
    assert {k: v for k, v in curves.items() if k in RESULTS} == {
        key: [(4, value)] for key, value in RESULTS.items()
    }
    assert json.loads(configs[0][0])["name"] == "smoke"


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, notes = interrupted_and_resumed("wandb", tmp_path, pause=1.0)  # names are of seconds
    curves: Curves = {}
    summary: dict[str, float] = {}
    ids, codes, configs = set(), [], []
    for file in sorted(folder.tracker.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add(record.run.run_id)
                    configs += [item.key for item in record.run.config.update]
                case "history":
                    row = {"/".join(i.nested_key): json.loads(i.value_json) for i in items(record)}
                    for key, value in row.items():
                        curves.setdefault(key, []).append((int(row["_step"]), value))
                case "summary":
                    summary |= {i.key: json.loads(i.value_json) for i in record.summary.update}
                case "exit":
                    codes.append(record.exit.exit_code)
    assert_complete(curves)
    assert ids == {json.loads((folder.tracker / "run.json").read_text())["id"]}
    assert codes == [1, 0]
    assert {"llm", "trainer", "seed"} <= set(configs)
    assert {name: summary[name] for name in RESULTS} == RESULTS
    assert all("wandb sync" in note for note in notes)


def items(record: object) -> Iterator[object]:
    yield from record.history.item  # type: ignore[attr-defined]


def wandb_records(file: Path) -> Iterator[object]:
    """The records of a `.wandb` file: the log format of LevelDB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # no header fits into the rest of a block
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_login_asks_nothing_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # of the test before
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    _, notes = interrupted_and_resumed("wandb", tmp_path)
    assert len(notes) == 2
    assert all("not logged in: run `wandb login`, or set WANDB_MODE=offline" in n for n in notes)


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_run_in_its_file_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    folder, notes = interrupted_and_resumed("mlflow", tmp_path)
    identity = json.loads((folder.tracker / "run.json").read_text())["id"]
    assert notes == [f"tracker: MLflow, experiment mine, run {identity}"] * 2
    (run,) = tmp_path.glob(f"store/*/{identity}")
    assert len(list(run.parent.glob("*/metrics"))) == 1
    curves: Curves = {}
    for file in (run / "metrics").rglob("*"):
        if file.is_file():
            lines = [line.split() for line in file.read_text().splitlines()]
            name = str(file.relative_to(run / "metrics"))
            curves[name] = [(int(step), float(value)) for _, value, step, *_ in lines]
    assert_complete(curves)
    assert {k: v for k, v in curves.items() if k in RESULTS} == {
        name: [(4, value)] for name, value in RESULTS.items()
    }
    assert (run / "params" / "trainer.kl_weight").read_text() == "100.0"
    assert "status: 3" in (run / "meta.yaml").read_text()  # finished


# What happens to the run --------------------------------------------------------------------------


def recorded(fails_at: str = "") -> tuple[list[str], Callable[..., Tool]]:
    """A tool that writes down its calls and fails at one of them."""
    calls: list[str] = []

    def call(name: str, what: object = "") -> None:
        calls.append(f"{name} {what}".strip())
        if name == fails_at:
            raise ConnectionError("the server is gone\nand more")

    def open_tool(kind: str, run: object) -> Tool:
        call("open")
        return Tool(
            id="a",
            where="somewhere",
            row=lambda numbers, step: call("row", step),
            results=lambda numbers, step: call("results", step),
            close=lambda state: call("close", state),
        )

    return calls, open_tool


@pytest.mark.parametrize(
    ("fails_at", "calls"),
    [
        ("", ["open", "row 1", "row 2", "row 3", "results 3", "close finished"]),
        ("open", ["open"]),
        ("row", ["open", "row 1"]),
        ("results", ["open", "row 1", "row 2", "row 3", "results 3"]),
        ("close", ["open", "row 1", "row 2", "row 3", "results 3", "close finished"]),
    ],
)
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    fails_at: str, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, open_tool = recorded(fails_at)
    monkeypatch.setattr(trackers, "_open", open_tool)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    folder, display = RunFolder(tmp_path), Notes()
    with tracked(small_config("tracker=wandb"), folder, display) as tracker:
        for iteration in (1, 2, 3):
            write_row(folder, iteration)
            tracker.iteration(iteration, 3, {})
        write_results(folder)
    assert seen == calls
    told = [note for note in display.notes if note != "tracker: somewhere"]
    words = (
        "tracker: wandb failed and gets nothing more; the run goes on, and metrics.jsonl has "
        "everything (the server is gone)"
    )
    assert told == [words] * bool(fails_at)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Interrupted("x"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("x"), "failed"),
    ],
)
def test_a_tracker_is_closed_on_every_way_out(
    error: BaseException, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, open_tool = recorded()
    monkeypatch.setattr(trackers, "_open", open_tool)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    folder = RunFolder(tmp_path)
    with pytest.raises(type(error)):
        stop_after(small_config("tracker=mlflow"), folder, Notes(), error, iterations=1)
    assert seen == ["open", "row 1", f"close {state}"]


def test_a_real_run_sends_the_rows_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, dict[str, float]] = {}
    ends: list[dict[str, float]] = []

    def open_tool(kind: str, run: object) -> Tool:
        return Tool(
            id="a",
            where="somewhere",
            row=lambda numbers, step: seen.update({step: dict(numbers)}),
            results=lambda numbers, step: ends.append(dict(numbers)),
            close=lambda state: None,
        )

    monkeypatch.setattr(trackers, "_open", open_tool)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    config = small_config("tracker=trackio", "trainer.iterations=2")
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with tracked(config, folder, Silent()) as tracker:
        train(config, folder, tracker, StopRequest())
    folder.close()
    rows = metrics.read(folder.metrics_file)
    assert [{"iteration": float(step), **numbers} for step, numbers in seen.items()] == [
        {"iteration": row["iteration"], **row} for row in rows
    ]
    (end,) = ends
    tuned = json.loads(folder.evaluation_file.read_text())["models"][1]
    assert end["result/tuned/kl_to_base"] == tuned["kl_to_base"]
    (group,) = tuned["groups"].values()
    assert end["result/tuned/corpus/satisfaction"] == group["satisfaction"]["mean"]
    folder.start(config, ["cft", "train"], clean=True).close()
    assert not folder.tracker.exists()


def test_only_the_first_rank_has_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, open_tool = recorded()
    monkeypatch.setattr(trackers, "_open", open_tool)
    folder = RunFolder(tmp_path)
    with tracked(small_config("tracker=mlflow"), folder, Notes(), leads=False) as tracker:
        tracker.iteration(1, 1, {})
    assert seen == []
    assert not folder.tracker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_before_anything_starts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExtraError, match=rf"pip install {kind}.*constrained-ft\[track\]"):
        require_installed(small_config(f"tracker={kind}").tracker)
    arguments = ["cft", "train", "experiment=smoke", f"tracker={kind}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
    assert f"pip install {kind}" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_run_is_named_after_its_folder(tmp_path: Path) -> None:
    assert trackers._name_of(tmp_path / "run-20260102-030405") == "run-20260102-030405"
    assert trackers._name_of(tmp_path / "smoke" / "3") == "smoke-3"


def test_no_tracker_is_the_default() -> None:
    config: Config = small_config()
    assert config.tracker.kind == "none"
