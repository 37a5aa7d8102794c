"""What the documentation says can be typed, can: every command parses, composes, and many run."""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from small import SMALL

from constrained_ft.cli.main import app, main
from constrained_ft.compose import compose
from constrained_ft.overrides import expand_sweep

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md")),
    ROOT / "constrained_ft" / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_OVERRIDE = re.compile(r"^[+~]?[\w./]+(@[\w.]+)?=")


def lines_of(page: Path) -> Iterator[str]:
    """Commands in the bash blocks of a page, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("&&"))


def commands() -> list[tuple[str, str]]:
    """Every `cft` command, with the page that has it."""
    return [
        (page.name, line)
        for page in PAGES
        for line in lines_of(page)
        if line.startswith("cft ") and "|" not in line
    ]


def parsed(line: str) -> click.Context:
    """The context of the command that would run: its options are known and have good values."""
    words = shlex.split(line, comments=True)[1:]
    if "--" in words:
        words = words[: words.index("--")]
    command: click.Command = typer.main.get_command(app)
    context = command.make_context("cft", words)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, context.protected_args + context.args)
        assert found is not None, name
        command, context = found, found.make_context(name, rest, parent=context)
    return context


def test_there_are_pages_and_commands() -> None:
    assert len(PAGES) > 9
    assert len(commands()) > 40


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_parses_and_its_overrides_compose(page: str, line: str) -> None:
    context = parsed(line)
    given = (
        [
            word
            for value in context.params.values()
            for word in ([value] if isinstance(value, str) else value or [])
            if isinstance(word, str) and _OVERRIDE.match(word)
        ]
        if context.info_name == "train" or context.params.get("overrides")
        else []
    )
    for job in expand_sweep(given) if context.params.get("multirun") else [given]:
        compose(job)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_of_the_docs_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem == "index":  # the site's own start
            continue
        assert f"docs/{page.name}" in readme


def test_the_site_has_every_page() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]

    def pages(entries: list[dict[str, Any]]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    assert sorted(pages(site["nav"])) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


# Commands that look at a run, run -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names that the documentation uses."""
    place = tmp_path_factory.mktemp("docs")
    leave([*SMALL, f"output_dir={place / 'RUN'}"], "train")
    shutil.copytree(place / "RUN", place / "OTHER_RUN")
    shutil.copytree(place / "RUN" / "final" / "llm", place / "PATH_OR_HUB_ID")
    (place / "my_prompts.txt").write_text("The baker opened\nA letter\n", encoding="utf-8")
    return place


def leave(arguments: list[str], command: str) -> None:
    """Run a command in this process; it has to end well."""
    try:
        main([command, *arguments])
    except SystemExit as end:
        assert end.code in (0, None), end.code  # noqa: PT017  # a command ends so when it is done


# What fetches data, takes long, uploads, or needs a run with adapters.
LEFT_OUT = (
    "--evaluation full",
    "--evaluation detection",
    "--benchmarks",
    "--push",
    "--form adapter",
)
LOOKS = [
    line
    for line in dict.fromkeys(line.partition("#")[0].strip() for _, line in commands())
    if re.match(r"cft (evaluate|explain|export|generate|report) RUN", line)
    and not any(part in line for part in LEFT_OUT)
]


@pytest.mark.parametrize("line", LOOKS)
def test_a_command_that_looks_at_a_run_runs(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    _, command, *arguments = shlex.split(line, comments=True)
    few = ["--samples-per-prompt", "4", "--max-prompts", "4"] if command == "evaluate" else []
    leave([*arguments, *few], command)
