"""`cft report`: what it says, against the files of the run; how it behaves, in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import Browser

from constrained_ft import metrics
from constrained_ft.cli.main import main
from constrained_ft.errors import ConfigError
from constrained_ft.report import report_command
from constrained_ft.report.figures import bars_of
from constrained_ft.report.text import visible
from tests.small import run, small_config
from tests.visit import Scheme, Visit

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    "</td></table><style>*{display:none}</style>{{ 7 * 7 }} | `x` **b** [l](javascript:hit) "
    "\x00\x1b[31m\u202eback\u2028" + "A" * 100_000
)
JUDGE = "a"


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def edit_rows(file: Path, change: Callable[[int, dict[str, Any]], object]) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a judge, and a violation among its samples whatever the tiny model said."""
    judge = f"evaluation.judge={{kind: letters, letter: {JUDGE}, at_most: 0}}"
    path = tmp_path_factory.mktemp("runs") / "finished"
    folder = run(small_config(judge), path)
    folder.write_status("finished", exit_code=0)
    edit_rows(
        folder.samples_file(3),
        lambda i, row: row.update(
            base=f"base {i}", tuned=f"tuned {i}", scores={"base": 0.9, "tuned": (0.1, 0.8)[i % 2]}
        ),
    )
    return path


def copy(source: Path, path: Path) -> Path:
    """The files of a run that a report reads."""
    return shutil.copytree(source, path, ignore=shutil.ignore_patterns("checkpoints", "final"))


def failed(path: Path) -> None:
    """Stopped after two iterations, in the middle of a line."""
    rows = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(rows[:2]) + '\n{"iteration": 3.0, "upd')
    edit(path / "evaluation.json", lambda tree: tree["models"].pop())
    edit(
        path / "status.json",
        lambda tree: tree.update(state="failed", reason="disk full", iteration=2),
    )
    (path / "phases.json").unlink()


def single(path: Path) -> None:
    rows = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text(rows[0] + "\n")


def unmeasured(path: Path) -> None:
    (path / "evaluation.json").unlink()


def damaged(path: Path) -> None:
    """Every file but the configuration is broken, each in another way."""
    (path / "evaluation.json").write_text('{"models": [{"model": "base"}]}')
    (path / "status.json").write_text("{")
    (path / "environment.json").write_text("[1]")
    (path / "phases.json").write_text('{"phases": 3}')
    (path / "metrics.jsonl").write_text('3\n{"update/ce": NaN, "update/kl": "x"}\n')
    shutil.rmtree(path / "samples")
    shutil.rmtree(path / "rollouts")


def hostile(path: Path) -> None:
    def spoil(number: int, row: dict[str, Any]) -> None:
        row.update(prompt=HOSTILE, base=HOSTILE, tuned=HOSTILE, completion=HOSTILE)

    for folder in ("samples", "rollouts"):
        for file in (path / folder).iterdir():
            edit_rows(file, spoil)
    edit(path / "status.json", lambda tree: tree.update(state="failed", reason=HOSTILE))
    edit(path / "environment.json", lambda tree: tree.update(host=HOSTILE))
    (path / "command.sh").write_text(HOSTILE)


CASES: dict[str, Callable[[Path], None]] = {
    "finished": lambda path: None,
    "failed": failed,
    "single": single,
    "unmeasured": unmeasured,
    "damaged": damaged,
    "hostile": hostile,
}


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of each case, and one of twenty runs."""
    found = {}
    for name, change in CASES.items():
        path = copy(finished, tmp_path_factory.mktemp("copy") / name)
        change(path)
        found[name] = report_command([path]).page
    sweep = tmp_path_factory.mktemp("sweep")
    for number in range(20):
        path = copy(finished, sweep / str(number))
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(re.sub(r"kl_weight: .*", f"kl_weight: {number}", config))
        if number == 7:
            failed(path)
            continue
        satisfied = {"mean": number / 20, "low": number / 20, "high": number / 20 + 0.02}
        edit(
            path / "evaluation.json",
            lambda tree, satisfied=satisfied, number=number: (
                [
                    group.update(satisfaction=satisfied)
                    for group in tree["models"][1]["groups"].values()
                ]
                + [tree["models"][1]["perplexity"]["corpus"].update(mean=30.0 + number % 7)]
            ),
        )
    found["twenty"] = report_command([sweep]).page
    return found


# What it says -------------------------------------------------------------------------------------


def test_the_verdict_is_that_of_the_evaluation(finished: Path, pages: dict[str, Path]) -> None:
    tree = json.loads((finished / "evaluation.json").read_text())
    page, text = pages["finished"].read_text(), markdown_text(pages["finished"])
    for model in tree["models"]:
        shares = (
            model["groups"]["corpus"]["violation"],
            model["groups"]["corpus"]["judges"]["judge"],
        )
        for one in shares:
            shown = f"{100 * one['mean']:.1f} % ({100 * one['low']:.1f}–{100 * one['high']:.1f})"
            assert shown in page
            assert shown in text
        assert f"{model['perplexity']['corpus']['mean']:.2f} (" in page
    p_value = next(one["p_value"] for one in tree["differences"] if one["group"] == "corpus")
    assert (f"p = {p_value:.3f}" if p_value >= 0.001 else "p &lt; 0.001") in page


def test_a_judge_that_is_quick_looks_at_every_iterations_rollouts(finished: Path) -> None:
    rows = metrics.read(finished / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        file = finished / "rollouts" / f"iteration_{int(row['iteration']):04d}.jsonl"
        said = [json.loads(line)["completion"] for line in file.read_text().split("\n") if line]
        without = [JUDGE not in text.lower() for text in said]
        assert row["judge/judge/satisfaction"] == pytest.approx(sum(without) / len(without))


def test_a_report_loads_no_torch(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from constrained_ft.cli.main import main\n"
        f"main(['report', {str(finished)!r}, '--output', {str(tmp_path)!r}])\n"
    )
    code = f"{code.replace('main([', 'try: main([')}except SystemExit as left: assert not left.code"
    code += "\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "index.html") in done.stdout.replace("\n", "")


@pytest.mark.parametrize("name", [*CASES, "twenty"])
def test_the_markdown_says_what_the_page_says(pages: dict[str, Path], name: str) -> None:
    page = pages[name].read_text()
    html = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render((pages[name].parent / "report.md").read_text())
    )
    for title in re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page):
        assert title.replace("&#39;", "'").replace("&#34;", "&quot;") in html
    assert html.count("<img ") == page.count("<figure ")
    for file in re.findall(r'src="(figures/[a-z-]+\.svg)"', html):
        assert (pages[name].parent / file).read_text().startswith("<?xml")
    assert not re.search(r"<(script|style|a |img (?!src=.figures/))", html)


def test_what_is_missing_is_named(pages: dict[str, Path]) -> None:
    failed_page = pages["failed"].read_text()
    assert "The run failed after 2 of 3 iterations." in failed_page
    assert "disk full" in failed_page
    assert "metrics.jsonl: 1 lines cannot be read" in failed_page
    assert "cft train --resume" in failed_page
    assert "cft evaluate" in pages["unmeasured"].read_text()
    for file in ("evaluation", "status", "phases"):
        assert f"{file}.json is damaged" in pages["damaged"].read_text()


def test_twenty_runs_are_placed_by_the_front(pages: dict[str, Path]) -> None:
    page = pages["twenty"].read_text()
    assert pages["twenty"].parent.name == "report"
    assert "19 of 20 runs are finished and measured." in page
    assert "7: failed, 2 of 3 iterations are finished; disk full" in page
    # Most satisfied first; perplexities repeat every seven, so 19, 16, 15 and 14 are not beaten.
    assert "No other run beats 14, 15, 16, 17, 18, 19 in both" in page


def test_the_stages_overlap_where_peers_learn() -> None:
    row = {"time/iteration": 10.0, "time/target": 0.5, "time/update": 7.5}
    peers = row | {"time/wait_llm": 4.0, "time/wait_target": 2.0}
    assert bars_of(row, "overlapped", peers=False) == {
        "target": (0.0, 0.5),
        "update": (0.5, 8.0),
        "rest": (8.0, 10.0),
    }
    both = bars_of(peers, "overlapped", peers=True)
    assert both == {"target": (0.0, 6.0), "update": (0.0, 8.0)}
    # After the last update nobody reads a target, and none is learned.
    assert bars_of(row, "overlapped", peers=True)["target"] == (0.0, 0.0)


# Wrong use ----------------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["report", str(tmp_path)])
    assert left.value.code == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_run_that_cannot_be_read_is_left_out(finished: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("nonsense: 1\n")
    written = report_command([finished, broken], tmp_path / "out")
    assert len(written.left_out) == 1
    assert "broken" in written.page.read_text()
    with pytest.raises(ConfigError, match="not a complete configuration"):
        report_command([broken], tmp_path / "out")


def test_a_missing_library_names_the_extra(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as left:
        main(["report", str(finished)])
    assert left.value.code == 3
    assert "pip install 'constrained-ft[report]'" in capsys.readouterr().err


def test_no_character_acts_or_hides() -> None:
    assert visible("a\x00b\x1b[0m\u202ec\n\td") == "a␀b␛[0m�c↵  d"
    assert visible("x" * 1000, 10) == "x" * 10 + "… (990 more characters)"


# In a browser -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, "twenty"])
def test_a_page_opens_quietly_and_fits_a_phone(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    visit = Visit(browser, pages[name].as_uri())
    for width in (1280, 380):
        visit.page.set_viewport_size({"width": width, "height": 900})
        assert visit.overflow() <= 0
        for figure in visit.page.locator("figure").all():
            box = figure.locator("svg").bounding_box()
            assert box is not None
            assert box["width"] > 250
            assert box["height"] > 80
            assert figure.locator("svg path").count() > 5
            assert figure.locator("svg text").count() > 2
    assert not visit.complaints
    assert visit.asked == [pages[name].as_uri()]
    assert visit.page.evaluate("window.hit") is None
    visit.page.close()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("finished", "light"), ("finished", "dark"), ("failed", "light"), ("twenty", "dark")],
)
def test_axe_finds_no_serious_fault(
    browser: Browser, pages: dict[str, Path], name: str, scheme: Scheme
) -> None:
    visit = Visit(browser, pages[name].as_uri(), scheme=scheme)
    visit.page.evaluate("document.querySelectorAll('details').forEach((one, i) => one.open = !i)")
    assert visit.serious_faults() == []
    visit.page.close()


def test_every_figure_of_a_finished_run_is_drawn(browser: Browser, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["finished"].as_uri()).page
    drawn = {one.get_attribute("id") for one in page.locator("figure").all()}
    expected = (
        *("before-and-after", "satisfaction", "scorer-and-judge", "cross-entropy", "kl", "lambda"),
        *("reliability", "roc-area", "tower", "phases", "timeline"),
    )
    assert drawn == {f"figure-{key}" for key in expected}
    legend = page.locator("#figure-scorer-and-judge svg text").all_text_contents()
    assert {"training scorer", "judge"} <= set(legend)
    # The colours are the theme's.
    dark = Visit(browser, pages["finished"].as_uri(), scheme="dark").page
    light_ink, dark_ink = (
        one.locator("#figure-kl svg text").first.evaluate("node => getComputedStyle(node).fill")
        for one in (page, dark)
    )
    assert light_ink != dark_ink


def test_a_violation_is_blurred_until_it_is_clicked(
    browser: Browser, pages: dict[str, Path]
) -> None:
    page = Visit(browser, pages["finished"].as_uri()).page
    veil = page.locator(".samples").first.locator(".veil", has_text="tuned 0").first
    blur = "node => getComputedStyle(node).filter"
    assert "blur" in veil.locator(".said").evaluate(blur)
    veil.click()
    assert veil.locator(".said").evaluate(blur) == "none"
    veil.press("Enter")  # and by the keyboard
    assert "blur" in veil.locator(".said").evaluate(blur)
    # What satisfies the constraint has no veil.
    assert page.locator(".veil", has_text="tuned 1").count() == 0
    page.locator(".unveil").first.click()
    states = (
        page.locator(".samples")
        .first.locator(".veil")
        .evaluate_all(
            "nodes => nodes.map(node => getComputedStyle(node.querySelector('.said')).filter)"
        )
    )
    assert set(states) == {"none"}


def test_a_heading_sorts_its_column(browser: Browser, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["finished"].as_uri()).page
    table = page.locator(".samples").first

    def column(number: int) -> list[float]:
        cells = table.locator(f"tbody tr td:nth-child({number})")
        texts = cells.evaluate_all("nodes => nodes.map(node => node.dataset.sort)")
        return [float(text) for text in texts if text]

    before = column(4)
    head = table.locator("thead th").nth(3)
    head.locator("button").click()
    assert column(4) == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert column(4) == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    # Runs, by a column of words and numbers.
    page = Visit(browser, pages["twenty"].as_uri()).page
    runs = page.locator("table.sortable").first
    names = runs.locator("tbody tr > :first-child")
    runs.locator("thead th").first.locator("button").click()
    assert names.all_text_contents() == [str(number) for number in range(20)]


def markdown_text(page: Path) -> str:
    """The Markdown as it reads."""
    html = MarkdownIt().enable("table").render((page.parent / "report.md").read_text())
    return re.sub(r"<[^>]+>", "", html)
