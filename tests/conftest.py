"""Fixtures of several test modules."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook
from playwright.sync_api import Browser, sync_playwright
from shell import Cft, Ran

# Shapes are checked in every call of the modules that state some, types alone by mypy.
ROOT = Path(__file__).resolve().parents[1]
SHAPED = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "constrained_ft").rglob("*.py")
    if "\nfrom jaxtyping import" in file.read_text(encoding="utf-8")
]
install_import_hook(SHAPED, "beartype.beartype")

from constrained_ft.cli.main import main  # noqa: E402  # behind the hook

# What `cft` sets before it imports other libraries; in a process that has imported them it cannot.
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--no-first-run"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium of the system, without a window."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def cft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cft:
    """`cft ARGUMENTS` in this process, from an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["cft", *arguments])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            main(arguments)
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        return Ran(int(code or 0), captured.out, captured.err)

    return run
