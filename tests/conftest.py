"""Fixtures of several test modules."""

import sys
from pathlib import Path

import pytest
from shell import Cft, Ran

from constrained_ft.cli.main import main


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
