"""Rows out of files of several formats, out of package wheels and off the hub."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from constrained_ft.config import DataConfig, DetectionConfig, PromptsConfig, SourceConfig
from constrained_ft.errors import CftError, DataError
from constrained_ft.resources import (
    WHEEL,
    check_reference,
    hub_failure,
    one_line,
    resolve_files,
)

_ENDINGS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
_BUILDERS = {"jsonl": "json", "csv": "csv", "parquet": "parquet", "text": "text"}


def check_sources(
    data: DataConfig, prompts: PromptsConfig, detection: DetectionConfig | None = None
) -> None:
    """See at once whether all local files are there; nothing is read or fetched.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if a local file is missing.
    """
    named: dict[str, SourceConfig] = {}
    for section, config in (("data", data), ("prompts", prompts)):
        for name, source in sources_of(config, "file").items():
            named[f"{section}.sources.{name}" if config.sources else section] = source
    if detection is not None:
        named["evaluation.detection.held_out"] = detection.held_out
        named["evaluation.detection.training"] = detection.training
    for prefix, source in named.items():
        for key, reference in (("path", source.path), ("exclude", source.exclude)):
            if reference is not None:
                with _named(f"{prefix}.{key}"):
                    check_reference(reference)


def sources_of(config: DataConfig | PromptsConfig, group: str) -> dict[str, SourceConfig]:
    """The sources of a section; a shorthand is one source named `group`."""
    if config.sources or (config.path is None and config.name is None):
        return dict(config.sources)
    names = "path name subset split format text_column skip_empty columns"
    given = config.model_dump()
    return {group: SourceConfig(**{key: given[key] for key in names.split() if key in given})}


def rows_of(name: str, source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source between first_row and last_row, each with where it stands."""
    position = 0
    for origin, format_, columns in _tables(name, source):
        size = len(next(iter(columns.values()), []))
        for index in range(size):
            position += 1
            row = {column: values[index] for column, values in columns.items()}
            if position <= source.first_row:
                continue
            if source.last_row is not None and position > source.last_row:
                return
            if format_ == "text" and not str(row["text"]).strip():
                continue  # Blank lines of a text file are layout.
            yield f"row {index + 1} of {origin}", row


def _tables(name: str, source: SourceConfig) -> Iterator[tuple[str, str, dict[str, list[Any]]]]:
    """Origin, format and columns of each file of a source, or of its hub dataset."""
    wanted = [source.text_column, "text", "prompt", "completion", "messages", "group"]
    wanted += source.columns
    if source.question is not None:
        wanted.append(source.question.label)
    if source.name is not None:
        yield source.name, "hub", _columns(_hub_table(source), wanted)
        return
    assert source.path is not None
    with _named(name):
        files = resolve_files(source.path)
    for file in files:
        origin = file.name if source.path.startswith(WHEEL) else str(file)
        format_ = _format(file, source)
        yield origin, format_, _columns(_file_table(file, format_, wanted), wanted)


def _columns(table: Any, wanted: list[str]) -> dict[str, list[Any]]:
    heads = {column.split(".")[0] for column in wanted} | set(wanted)
    kept = [column for column in table.column_names if column in heads]
    # Without a known column the others are kept, so that the message can name them.
    columns: dict[str, list[Any]] = table.select_columns(kept or table.column_names)[:]
    return columns


def _format(file: Path, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    found = _ENDINGS.get(file.suffix.lower())
    if found is None:
        raise DataError(
            f"{file}: the format does not follow from the ending {file.suffix!r}; set format to "
            "jsonl, csv, parquet or text"
        )
    return found


def _file_table(file: Path, format_: str, wanted: list[str]) -> Any:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty")
    options: dict[str, Any] = {}
    if format_ == "csv":
        # All CSV is text: without this, `NA` would be missing and `007` a number.
        options = {"converters": dict.fromkeys(wanted, str), "na_filter": False}
    with _quiet_datasets() as datasets, tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                _BUILDERS[format_],
                data_files=[str(file)],
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except Exception as error:
            raise DataError(_explain_file(file, format_, error)) from error
    if "__index_level_0__" in table.column_names:
        raise DataError(f"{file}: rows have more fields than the header; quote commas in texts")
    return table


def _explain_file(file: Path, format_: str, error: Exception) -> str:
    if format_ == "jsonl" and file.suffix != ".json":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError as bad:
                    return f"row {number} of {file} is not JSON: {one_line(bad)}"
                if not isinstance(row, dict):
                    return f"row {number} of {file} is not a JSON object with named fields"
    if "no data" in str(error) or isinstance(error, StopIteration):
        return f"{file} has no rows"
    return f"cannot read {file} as {format_}: {one_line(error.__cause__ or error)}"


def _hub_table(source: SourceConfig) -> Any:
    assert source.name is not None
    failure = hub_failure(source.name, "dataset", None)
    if failure is not None:
        raise DataError(
            f"cannot read the dataset {source.name} from the hub: {one_line(failure)}; check the "
            "name and the connection, set HF_HUB_OFFLINE=1 to use the hub's own cache, or give a "
            "local file as `path`"
        ) from failure
    with _quiet_datasets() as datasets:
        try:
            return datasets.load_dataset(source.name, source.subset, split=source.split)
        except Exception as error:
            raise DataError(
                f"cannot read the split {source.split!r} of the dataset {source.name}: "
                f"{one_line(error)}"
            ) from error


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The `datasets` library without its progress bars and log lines: errors are told by us."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Say which source a failure belongs to."""
    try:
        yield
    except CftError as error:
        raise type(error)(f"{key}: {error}") from error
