"""What scripts/bench.py measures of whole runs, and of scoring beside sampling."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from bench_ratio import Ratio
from faulty_service import FaultyService

from constrained_ft.compose import compose
from constrained_ft.distributed import StopRequest, World
from constrained_ft.parts import build_parts
from constrained_ft.progress import Silent
from constrained_ft.sampling import sample
from constrained_ft.scorer_config import FunctionScorerConfig
from constrained_ft.scorers import build_scorer
from constrained_ft.scoring import Scoring

ROOT = Path(__file__).parents[1]


def trained(folder: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run of its own process in `folder`."""
    command = [sys.executable, "-m", "constrained_ft.cli.main", "-q", "train", *arguments]
    command += [f"output_dir={folder}"]
    found = dict(os.environ) | environment
    subprocess.run(command, check=True, env=found, cwd=folder.parent, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Overlap: of sampling with scoring, and of both sides of a run.

SLOW_SCORER = """
import time

def score(prompts, completions):
    time.sleep(float(open({seconds!r}).read()))
    return [float("e" not in text) for text in completions]
"""
PROMPTS, LATENCY, IN_FLIGHT = 128, 0.2, 50
RUN = ("experiment=smoke", "trainer.iterations=10", "trainer.steps_per_iteration=96")


def scoring_rows(_: str | None) -> list[Ratio]:
    """A scorer that takes its time, asked while sampling goes on: four batches of 64."""
    config = compose(["sampler.batch_size=64"])
    parts = build_parts(config, Silent(), StopRequest())
    llm, prompts = parts.llm.frozen(), parts.prompts.training[:PROMPTS]
    place = Path(tempfile.mkdtemp(prefix="cft-bench-"))
    (place / "seconds").write_text(str(LATENCY))
    (place / "slow.py").write_text(SLOW_SCORER.format(seconds=str(place / "seconds")))
    path = f"{place / 'slow.py'}:score"
    scorer = build_scorer(FunctionScorerConfig(kind="function", path=path, in_flight=IN_FLIGHT))

    def sampled(*, scored: bool) -> None:
        with Scoring([scorer] if scored else [], World.alone(), StopRequest()) as scoring:
            rollouts = sample(
                llm,
                prompts,
                samples_per_prompt=2,
                max_new_tokens=20,
                sampler=config.sampler,
                seed=0,
                iteration=1,
                display=Silent(),
                stop=StopRequest(),
                each=scoring.begin,
            )
            scoring.finish(rollouts, most_missing=0.0)

    name = (
        f"sampling and scoring ({LATENCY:g} s a completion, {IN_FLIGHT} in flight) / sampling alone"
    )
    return [
        Ratio(
            name=name,
            ours=lambda: sampled(scored=True),
            theirs=lambda: sampled(scored=False),
            must=1.15,
            aim=1.08,
        )
    ]


def overlap_rows(_: str | None) -> list[Ratio]:
    """Two processes, of which one learns the target while the other updates the LLM.

    The scorer waits so long that both sides take about the same time; one thread each.
    """
    place = Path(tempfile.mkdtemp(prefix="cft-bench-"))
    (place / "slow.py").write_text(SLOW_SCORER.format(seconds=str(place / "seconds")))

    def run(name: str, seconds: float, *arguments: str) -> dict[str, float]:
        """Medians over the iterations that are like each other."""
        (place / "seconds").write_text(str(seconds))
        scorer = ("constraint=function", f"constraint.scorer.path={place / 'slow.py'}:score")
        arguments = (*RUN, *scorer, "sampler.batch_size=512", *arguments)
        rows = trained(place / name, *arguments, OMP_NUM_THREADS="1")
        rows = rows[2:-1:2]  # the others also complete the fixed prompts
        names = ("time/target", "time/update", "time/iteration")
        return {name: statistics.median(row[name] for row in rows) for name in names}

    @lru_cache
    def measured() -> tuple[dict[str, float], dict[str, float]]:
        bare = run("bare", 0.0, "--nproc-per-node", "1")
        wait = max(0.0, bare["time/update"] - bare["time/target"])
        alone = run("alternating", wait, "--nproc-per-node", "1")
        peers = ("trainer=overlapped", "placement=peers", "--nproc-per-node", "2")
        return alone, run("peers", wait, *peers)

    def to_longer() -> float:
        alone, peers = measured()
        return peers["time/iteration"] / max(alone["time/target"], alone["time/update"])

    def to_alternating() -> float:
        alone, peers = measured()
        return peers["time/iteration"] / alone["time/iteration"]

    what = "iteration, overlapped with a peer"
    return [
        Ratio(name=name, ours=None, theirs=None, value=value, must=must, aim=aim, own_load=True)
        for name, value, must, aim in (
            (f"{what} / its longer phase alone", to_longer, 1.15, 1.05),
            (f"{what} / alternating in one process", to_alternating, 1 / 1.3, 0.55),
        )
    ]


# A service that misbehaves, against the same one that does not.

SERVED = (
    *("trainer.iterations=6", "trainer.warmup_steps=1", "evaluation.max_prompts=16"),
    *("constraint=http", "constraint.labels=soft", "constraint.satisfied_at=0.3"),
    "constraint.scorer.timeout=1",
    "constraint.scorer.request={texts: '{completions}'}",
)
SERVICE_LATENCY = 0.1


def service_rows(_: str | None) -> list[Ratio]:
    """Training whose scores come from a service of which 46 % of the requests fail.

    Its labels have to be those of a sound service: both runs end with the same weights.
    """
    place = Path(tempfile.mkdtemp(prefix="cft-bench-"))

    def run(batch: int, *, faulty: bool) -> tuple[float, float, str]:
        """Seconds of the iterations, requests a completion, and a hash of the weights."""
        folder = place / f"{batch} {faulty}"
        with FaultyService(faulty=faulty, latency=SERVICE_LATENCY, hang=2.0) as service:
            scorer = (
                f"constraint.scorer.url={service.url}",
                f"constraint.scorer.batch_size={batch}",
            )
            rows = trained(folder, *SERVED, *scorer)
            requests = sum(service.seen.values())
        seconds = sum(row["time/iteration"] for row in rows)
        weights = hashlib.sha256()
        for file in sorted((folder / "final").rglob("*.safetensors")):
            weights.update(file.read_bytes())
        return seconds, requests, weights.hexdigest()

    @lru_cache
    def measured(batch: int) -> tuple[float, float]:
        slow, more, weights = run(batch, faulty=True)
        quick, fewest, same = run(batch, faulty=False)
        if weights != same:
            raise SystemExit("the labels differ: the runs end with other weights")
        return slow / quick, more / fewest / batch

    def both(batch: int, place: int) -> float:
        return measured(batch)[place]

    what = "training with a service that fails 46 % of the time"
    return [
        Ratio(name=name, ours=None, theirs=None, value=value, must=must, aim=aim, own_load=True)
        for batch in (8, 1)
        for name, value, must, aim in (
            (f"{what}, {batch} a request: time / without", partial(both, batch, 0), 1.25, 1.1),
            (
                f"{what}, {batch} a request: requests a completion",
                partial(both, batch, 1),
                1.6,
                1 / batch,
            ),
        )
    ]


# The default run, against the first version of it.

FIRST = "5e8584f8d2ace2f235f133ac3084ff08c6c42d08"  # 4.3 % toxic of 10.9, perplexity of news 35.92
FIRST_ITERATIONS = 6
ENOUGH_ITERATIONS = 18  # 3.3 % toxic of 10.4, perplexity 31.29: cft train trainer.iterations=18
GLANCE = ("evaluation.max_prompts=16", "evaluation.samples_per_prompt=8")


def history_rows(_: str | None) -> list[Ratio]:
    """Training until the model is at least as good as the first version made it.

    Iterations of either version are alike, so a few of them are timed and counted as often as a
    run has them. Needs the history of the repository, and pip.
    """
    place = Path(tempfile.mkdtemp(prefix="cft-bench-"))

    def install() -> Path:
        source, installed = place / "source", place / "installed"
        source.mkdir()
        parts = ("pyproject.toml", "README.md", "LICENSE", "constrained_ft", "cli", "conf")
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", FIRST, *parts], check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "x", "-C", str(source)], check=True, input=archive)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        pip += ["--no-build-isolation", "--target", str(installed), str(source)]
        subprocess.run(pip, check=True)
        return installed

    def seconds(name: str, *overrides: str, path: Path | None = None) -> float:
        """Of one iteration: the median, without the first, which warms up, if there are more."""
        arguments = (*GLANCE, "trainer.warmup_steps=0", *overrides)
        rows = trained(place / name, *arguments, **({"PYTHONPATH": str(path)} if path else {}))
        times = [row["time/iteration"] for row in rows]
        return statistics.median(times[1:] or times)

    def measured() -> float:
        path = install()
        firsts, todays = [], []
        for number in range(2):
            firsts.append(seconds(f"first{number}", "trainer.iterations=1", path=path))
            todays.append(seconds(f"today{number}", "trainer.iterations=6"))
        ours = statistics.mean(todays) * ENOUGH_ITERATIONS
        return ours / (statistics.mean(firsts) * FIRST_ITERATIONS)

    return [
        Ratio(
            name="training until as good as the first version / its default run",
            ours=None,
            theirs=None,
            value=measured,
            must=0.6,
            aim=0.4,
            own_load=True,
        )
    ]
