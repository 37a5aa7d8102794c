"""A commented configuration for the user's own data, after a look at it: what `cft init` writes."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from constrained_ft.compose import compose
from constrained_ft.config import Config, SourceConfig
from constrained_ft.errors import CftError, DataError
from constrained_ft.groups import EXPERIMENT, groups
from constrained_ft.intervals import bootstrap
from constrained_ft.keys import find_key
from constrained_ft.loading import load_tokenizer
from constrained_ft.overrides import assignment, values_of
from constrained_ft.records import Chat, Completion, Labelled, Record, Text, grouped_records
from constrained_ft.resources import is_at_hand
from constrained_ft.scorer_config import is_quick
from constrained_ft.scorers import least_scores, probed
from constrained_ft.sources import rows_of

_SCORED = 1000
_CHARACTERS = 4  # of a token, where there is no tokenizer at hand
_STEP, _LONGEST = 64, 512  # of data.max_length, in tokens
_LOOKED_AT = 50  # rows, to find the column of the text
_WIDTH = 96

_DEFAULTS = {"llm": "smollm2", "constraint": "toxicity"}
# What people change first.
_KNOBS = (
    *("seed", "constraint.satisfied_at", "constraint.threshold", "prompts.max_new_tokens"),
    *("trainer.iterations", "trainer.kl_weight"),
)
_AMOUNTS = ("prompts.prompts_per_iteration", "prompts.samples_per_prompt")
_HEADINGS = {
    "": "The run.",
    "llm": "The model that is fine-tuned.",
    "auxiliary": "The auxiliary model R.",
    "constraint": "What completions have to satisfy, and how strictly.",
    "data": "The corpus that is learned.",
    "prompts": "The prompts that completions are sampled for.",
    "trainer": "The training.",
    "evaluation": "What is measured before and after.",
}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A configuration file and what was seen on the way."""

    text: str
    facts: Mapping[str, str]
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was seen in the corpus."""

    records: list[Record]
    lengths: np.ndarray
    unit: str

    def sentence(self) -> str:
        kinds = Counter(type(record.content) for record in self.records)
        names = {Text: "text", Completion: "prompt + completion", Chat: "chat"}
        what = ", ".join(f"{count:,} of {names[kind]}" for kind, count in kinds.items())
        least, half, most = np.quantile(self.lengths, [0.0, 0.5, 1.0])
        return f"{what}; {least:,.0f} to {most:,.0f} {self.unit} a row, half up to {half:,.0f}"


def draft(
    file: str | None, overrides: Sequence[str], config_dirs: Sequence[Path], output: Path
) -> Draft:
    """Look at a file and put the configuration together.

    Args:
        file: the user's corpus; None keeps that of the default run.
        overrides: what the user decided already, `group=option` and `section.key=value`.
        config_dirs: folders of the user's own groups.
        output: where the file will be, for its comments.

    Raises:
        ConfigError: if an override is wrong, or leaves something open.
        DataError: if the file cannot be used.
    """
    known = groups(config_dirs)
    given = values_of(overrides)
    added = {} if file is None else _of_file(file, given)
    notes: dict[str, str] = {}
    facts: dict[str, str] = {}
    remarks: list[str] = []

    def composed() -> Config:
        return compose([*(_override(key, added[key]) for key in added), *overrides], config_dirs)

    config = composed()
    if file is not None:
        look = _look(config)
        facts["rows"] = notes["data.path"] = look.sentence()
        length = given.get("data.max_length", _max_length(look))
        added |= {} if "data.max_length" in given else {"data.max_length": length}
        notes["data.max_length"] = (
            f"{float((look.lengths > length).mean()):.1%} of yours are longer."
        )
        facts["rejected"], remarks = _rejected(look.records, config)
        notes["constraint"] = f"Of your rows it rejects: {facts['rejected']}."
        config = composed()
        facts["passes"] = notes["trainer.iterations"] = _passes(look, config)
    is_toxicity = given.get("constraint", "toxicity") == "toxicity" and EXPERIMENT not in given
    if not is_toxicity and "evaluation.judge" not in given and config.evaluation.judge is not None:
        added["evaluation.judge"] = None
        notes["evaluation.judge"] = "The default judge looks for offensive words: name your own."
        config = composed()
    shown = {group: option for group, option in _DEFAULTS.items() if EXPERIMENT not in given}
    shown |= {key: _value(config, key) for key in _KNOBS if EXPERIMENT not in given} | added | given
    return Draft(text=_yaml(shown, notes, known, output), facts=facts, remarks=tuple(remarks))


def _of_file(file: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options and keys that a corpus file asks for."""
    found: dict[str, Any] = {"data": "file", "data.path": file, "prompts": "corpus"}
    found["name"] = _name(Path(file).stem)
    # As many completions as the steps of the default run read.
    usual = compose([]) if "prompts" not in given else None
    found |= {key: _value(usual, key) for key in _AMOUNTS if usual is not None}
    column = given.get("data.text_column") or _text_column(file)
    if column != "text":
        found["data.text_column"] = column
    return {key: value for key, value in found.items() if key not in given}


def _name(stem: str) -> str:
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in stem)
    return kept.strip("-") or "run"


def _text_column(file: str) -> str:
    """The column with the text: `text` where rows have one, else the one with the longest texts."""
    rows = [row for _, row in islice(rows_of("data.path", SourceConfig(path=file)), _LOOKED_AT)]
    names = {name for row in rows for name, value in row.items() if value is not None}
    if "text" in names or "messages" in names or {"prompt", "completion"} <= names:
        return "text"
    lengths: Counter[str] = Counter()
    for row in rows:
        lengths.update({name: len(text) for name, text in row.items() if isinstance(text, str)})
    if not lengths:
        raise DataError(
            f"{file} has no column of text; it has {', '.join(sorted(names)) or 'nothing'}. It "
            "needs `text`, or `prompt` and `completion`, or `messages`"
        )
    return lengths.most_common(1)[0][0]


def _look(config: Config) -> _Look:
    """Read the corpus; in tokens where the model's tokenizer is here, else by the characters."""
    records = [one for some in grouped_records(config.data).values() for one in some]
    texts = [_text(record) for record in records]
    if not is_at_hand(config.llm.model_name_or_path, config.llm.revision):
        lengths = np.array([len(text) / _CHARACTERS for text in texts])
        return _Look(records=records, lengths=lengths, unit="tokens (of 4 characters, a guess)")
    tokenizer = load_tokenizer(config.llm)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return _Look(records=records, lengths=np.array([len(one) for one in ids]), unit="tokens")


def _text(record: Record) -> str:
    match record.content:
        case Text(text=text):
            return text
        case Completion(prompt=prompt, completion=completion):
            return prompt + completion
        case Labelled(question=question):
            return question
        case Chat(messages=messages):
            return "\n".join(str(message["content"]) for message in messages)


def _max_length(look: _Look) -> int:
    """What holds all rows but the longest twentieth, in steps, up to a limit."""
    wanted = float(np.quantile(look.lengths, 0.95)) + 1
    return int(min(_LONGEST, _STEP * -(-wanted // _STEP)))


def _rejected(records: Sequence[Record], config: Config) -> tuple[str, list[str]]:
    """The share of rows that the constraint rejects, in words, where asking costs little."""
    terms = config.constraint.all_terms().values()
    if not all(is_quick(term.scorer) for term in terms):
        return "not asked, its scorer takes its time; `cft data check` asks it", []
    some = [records[len(records) * i // _SCORED] for i in range(min(_SCORED, len(records)))]
    if len(records) <= _SCORED:
        some = list(records)
    sides = [_sides(record) for record in some]
    rejected = np.zeros(len(some), dtype=bool)
    try:
        for term in terms:
            scores = least_scores([probed(term.scorer)], *map(list, zip(*sides, strict=True)))
            bar = term.satisfied_at
            rejected |= np.array([score is not None and score < bar for score in scores])
    except CftError as error:
        return "unknown, as its scorer cannot be asked", [str(error)]
    return f"{bootstrap(rejected).percent()}, {len(some):,} looked at", []


def _sides(record: Record) -> tuple[str, str]:
    """What a scorer sees of a record: what stands before, and the text."""
    match record.content:
        case Completion(prompt=prompt, completion=completion):
            return prompt, completion
        case Chat(messages=messages):
            return "", str(messages[-1]["content"])
        case _:
            return "", _text(record)


def _passes(look: _Look, config: Config) -> str:
    """How often the training comes by every row."""
    trainer = config.trainer
    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    steps = trainer.iterations * trainer.steps_per_iteration
    pieces = float(np.ceil(look.lengths / config.data.max_length).clip(min=1).sum())
    return (
        f"{trainer.iterations} iterations x {trainer.steps_per_iteration} steps x {rows} rows: "
        f"{steps * rows / pieces:.1f} times the corpus"
    )


def _override(key: str, value: object) -> str:
    return assignment(key, value) if isinstance(value, str) else f"{key}={json.dumps(value)}"


def _value(config: Config, key: str) -> Any:
    found: Any = config.model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    return found


def _yaml(
    shown: Mapping[str, Any],
    notes: Mapping[str, str],
    known: Mapping[str, list[str]],
    output: Path,
) -> str:
    """The file: a heading for each section, above each key what it means and what was seen."""
    lines = [
        f"# Written by `cft init`. Look at it:  cft train --config {output} --dry-run",
        f"# Start it:  cft train --config {output}",
        "# Every key and option, with its meaning:  cft config list",
    ]
    sections: dict[str, list[str]] = {}
    for key in shown:
        section = key.partition(".")[0]
        sections.setdefault(section if section in known else "", []).append(key)
    order = ["", EXPERIMENT, *known]
    for section in sorted(sections, key=order.index):
        lines += ["", f"# --- {_HEADINGS.get(section, section)}"]
        for key in sorted(sections[section], key=lambda name: (name != section, "." in name)):
            meaning = find_key(key)
            words = [] if meaning is None or key in known else [meaning.doc]
            if key in known:
                words.append(f"{' · '.join(known[key])}")
            words += [notes[key]] if key in notes else []
            lines += ["", *(f"# {line}" for one in words for line in textwrap.wrap(one, _WIDTH))]
            lines.append(f"{key}: {json.dumps(shown[key], ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
