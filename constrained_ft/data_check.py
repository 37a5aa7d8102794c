"""What `cft data check` finds in a corpus, before anything is trained on it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from constrained_ft.config import Config
from constrained_ft.corpus import prompt_and_text
from constrained_ft.encoding import Document, Encoder, Row
from constrained_ft.errors import CftError
from constrained_ft.intervals import bootstrap
from constrained_ft.loading import load_tokenizer
from constrained_ft.order import held_out_by_hash
from constrained_ft.progress import Display
from constrained_ft.records import Record, grouped_records
from constrained_ft.scorer_config import is_slow
from constrained_ft.scorers import least_scores, probed
from constrained_ft.sources import check_sources

SCORED = 1000
_SHOWN = 48  # tokens of the row that is shown: its begin and its end
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Tables for people, and what to think about."""

    groups: Table
    scores: Table
    shown: str
    """Where the row that is shown comes from."""
    tokens: Table
    remarks: tuple[str, ...]
    """Each with what can be done."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    records: list[Record]
    documents: list[Document]
    held_out: list[bool]
    repeat: int

    @property
    def rows(self) -> list[Row]:
        return [row for document in self.documents for row in document.rows]


def check_command(config: Config, display: Display, *, row: int, scored: int | None) -> DataReport:
    """Read a corpus as training would, and describe it.

    Args:
        config: of its `data`, `llm` (the tokenizer) and `constraint`.
        display: what people watch.
        row: which record is shown token by token, from 1.
        scored: how many rows of each group the scorer is asked about; None: 1,000, and none where
            it runs a model or asks a service.

    Raises:
        DataError: when the corpus cannot be used.
        ModelError: when the tokenizer is missing.
    """
    check_sources(config.data, config.prompts)
    display.phase("reading the tokenizer and the corpus", 1)
    tokenizer = load_tokenizer(config.llm)
    encoder, groups = Encoder(tokenizer), {}
    for (name, repeat), records in grouped_records(config.data).items():
        groups[f"{name} (each {repeat} times)" if repeat > 1 else name] = _Group(
            records=records,
            documents=encoder.documents(records, config.data.max_length),
            held_out=held_out_by_hash([one.key for one in records], config.data.validation_share),
            repeat=repeat,
        )
    everything = [pair for group in groups.values() for pair in _pairs(group)]
    record, document = everything[min(row, len(everything)) - 1]
    scores, remarks = _scores(groups, config, tokenizer, display, scored)
    return DataReport(
        groups=_group_table(groups, tokenizer),
        scores=scores,
        shown=record.origin,
        tokens=_token_table(document.rows[0], tokenizer),
        remarks=(*_remarks(groups, config), *remarks),
    )


def _pairs(group: _Group) -> Iterator[tuple[Record, Document]]:
    yield from zip(group.records, group.documents, strict=True)


def _group_table(groups: dict[str, _Group], tokenizer: PreTrainedTokenizerBase) -> Table:
    columns = {name: _facts(group, tokenizer) for name, group in groups.items()}
    titles = list(next(iter(columns.values())))
    return ["", *columns], [
        [title, *(facts[title] for facts in columns.values())] for title in titles
    ]


def _facts(group: _Group, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    kinds = Counter(type(record.content).__name__.lower() for record in group.records)
    lengths = np.quantile([document.length for document in group.documents], _QUANTILES)
    rows = group.rows
    tokens = sum(len(row.token_ids) for row in rows)
    trained = sum(sum(row.trained) for row in rows)
    labels = sum(row.label is not None for row in rows)
    count = len(group.documents)
    cut = sum(document.truncated for document in group.documents)
    split = sum(len(document.rows) > 1 for document in group.documents)
    ended = sum(_trains_end(document, tokenizer) for document in group.documents)
    equal = count - len({record.key for record in group.records})
    return {
        "rows read": f"{count:,} ({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())})",
        "tokens a row: least, 5 %, half, 95 %, most": " / ".join(f"{q:,.0f}" for q in lengths),
        "split into several": _share(split, count),
        "cut at their end": _share(cut, count),
        "tokens": f"{tokens:,}, {trained:,} of them trained"
        + (f"; {labels:,} labels" if labels else ""),
        "end of text is trained": _share(ended, count),
        "the same as an earlier row": _share(equal, count),
        "held out for perplexity": _share(sum(group.held_out), count),
    }


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f} %)"


def _trains_end(document: Document, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model learns to stop where the record ends."""
    last = document.rows[-1]
    return last.token_ids[-1] == tokenizer.eos_token_id and last.trained[-1]


def _token_table(row: Row, tokenizer: PreTrainedTokenizerBase) -> Table:
    """The row token by token; of a long one the begin and the end."""
    size = len(row.token_ids)
    shown = [*range(size)]
    if size > _SHOWN:
        shown = [*range(_SHOWN - 12), *range(size - 12, size)]
    cells, before = [], -1
    for place in shown:
        if place != before + 1:
            cells.append(["...", f"{place - before - 1} more", "", ""])
        token = row.token_ids[place]
        text = repr(tokenizer.decode([token]))
        end = " (end of text)" if token == tokenizer.eos_token_id else ""
        mark = "trained" if row.trained[place] else "–"
        if row.label is not None and place == size - 1:
            mark = f"label: {'positive' if row.label else 'negative'}"
        cells.append([str(place), str(token), f"{text}{end}", mark])
        before = place
    return ["position", "id", "text", "loss"], cells


def _scores(
    groups: dict[str, _Group],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    display: Display,
    scored: int | None,
) -> tuple[Table, list[str]]:
    """What the constraint says of some rows of each group, evenly spread over it."""
    columns = ["", "rows scored", "rejected", "without a score"]
    terms = config.constraint.all_terms()
    if scored is None:
        scored = 0 if any(is_slow(term.scorer) for term in terms.values()) else SCORED
    if scored == 0:
        return (columns, []), ["the scorer was not asked; --scored N asks it about N rows a group"]
    table: list[list[str]] = []
    display.phase("scoring", len(groups))
    try:
        for name, group in groups.items():
            rows = _spread(group.rows, scored)
            asked = [prompt_and_text(row, tokenizer) for row in rows]
            rejected: list[bool | None] = [False] * len(rows)
            for term in terms.values():
                found = least_scores([probed(term.scorer)], *_sides(asked))
                for place, score in enumerate(found):
                    before = rejected[place]
                    if score is None or before is None:
                        rejected[place] = None
                    else:
                        rejected[place] = before or score < term.satisfied_at
            known = [float(one) for one in rejected if one is not None]
            share = bootstrap(known).percent() if known else "–"
            table.append([name, f"{len(rows):,}", share, _share(len(rows) - len(known), len(rows))])
            display.advance()
    except CftError as error:
        return (columns, table), [f"the scorer cannot be asked: {error}"]
    return (columns, table), []


def _sides(asked: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [prompt for prompt, _ in asked], [text for _, text in asked]


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) <= count:
        return list(rows)
    return [rows[len(rows) * place // count] for place in range(count)]


def _remarks(groups: dict[str, _Group], config: Config) -> list[str]:
    """What one may want to change, with the key."""
    documents = [document for group in groups.values() for document in group.documents]
    records = [record for group in groups.values() for record in group.records]
    longest = max(document.length for document in documents)
    remarks = []
    cut = sum(document.truncated for document in documents)
    if cut:
        remarks.append(
            f"{_share(cut, len(documents))} of the rows lose their end; raise data.max_length, "
            f"{longest:,} would hold all"
        )
    equal = len(records) - len({record.key for record in records})
    if equal:
        first = next(key for key, n in Counter(record.key for record in records).items() if n > 1)
        remarks.append(
            f"rows that repeat an earlier one: {equal:,}, such as {_excerpt(first)!r}; remove "
            "them, or use data.sources.<name>.repeat for those that are to come up more often"
        )
    most = max((len(row.token_ids) for one in documents for row in one.rows), default=0)
    if most < config.data.max_length // 2:
        remarks.append(
            f"no row is longer than {most} tokens; data.max_length={most} takes less memory"
        )
    return remarks


def _excerpt(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
