"""`cft report`: what finished and unfinished runs did, as a page and as Markdown.

Runs are read from their folders and nothing is computed anew, so no torch is loaded. Whatever a
folder lacks, because the run failed, still runs or was not evaluated, is left out and named.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from constrained_ft.errors import ConfigError, ModelError
from constrained_ft.report.reading import Run, read_run
from constrained_ft.run_folder import RunFolder, write_atomically

__all__ = ["Written", "report_command"]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `report_command` made."""

    page: Path
    markdown: Path
    headline: str
    """The verdict, in a sentence."""
    left_out: list[str]
    """Runs that could not be read, and why."""


def report_command(targets: Sequence[Path], output: Path | None = None) -> Written:
    """Write the report of one run, or of several side by side.

    Args:
        targets: run folders, and folders of sweeps, which stand for their runs.
        output: the folder to write to; None is `report` in the only target, or a folder in
            `reports`.

    Raises:
        ConfigError: when a target holds no run, no run can be read, or nothing can be written.
        ModelError: when jinja2 or matplotlib is missing.
    """
    _require_libraries()
    folders = [folder for target in targets for folder in _runs_in(target)]
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs, left_out = _read(folders)
    where = output or _default_output(targets, folders)
    if not _can_write(where):
        raise ConfigError(f"--output {where}: cannot write there; choose another folder")
    from constrained_ft.report.one_run import one_run
    from constrained_ft.report.page import render
    from constrained_ft.report.several_runs import several_runs

    content = one_run(runs[0]) if len(folders) == 1 else several_runs(runs, left_out)
    page, markdown = render(content)
    for chart in content.charts:
        write_atomically(where / "figures" / f"{chart.key}.svg", chart.file, durable=False)
    write_atomically(where / "report.md", markdown, durable=False)
    write_atomically(where / "index.html", page, durable=False)
    return Written(
        page=where / "index.html",
        markdown=where / "report.md",
        headline=content.verdict.headline,
        left_out=left_out,
    )


def _require_libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"a report needs jinja2 and matplotlib: pip install 'constrained-ft[report]' ({error})"
        ) from error


def _runs_in(target: Path) -> list[Path]:
    """The run of a folder, or all runs of a sweep's folder, by number."""
    if RunFolder(target).config_file.is_file():
        return [target]
    jobs = sorted(
        (file.parent for file in target.glob("*/config.yaml")),
        key=lambda folder: (len(folder.name), folder.name),
    )
    if not jobs:
        raise ConfigError(
            f"{target} holds no run: there is no config.yaml in it; name the folder of a run, or "
            "that of a sweep"
        )
    return jobs


def _read(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and those that cannot be read with the reason."""
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            left_out.append(str(error))
    if not runs:
        raise ConfigError("\n".join(left_out))
    return runs, left_out


def _default_output(targets: Sequence[Path], folders: Sequence[Path]) -> Path:
    if len(targets) == 1:
        return targets[0] / "report"
    parents = {folder.resolve().parent for folder in folders}
    first = folders[0].resolve()
    name = first.parent.name if len(parents) == 1 and len(folders) > 2 else first.name
    others = folders[1].resolve().name if len(folders) == 2 else f"{len(folders)}-runs"
    return Path("reports") / f"{name}-{others}"


def _can_write(folder: Path) -> bool:
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK)
