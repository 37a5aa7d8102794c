"""300 wrong configurations, made from the schema: each gets one message with its key and a cure."""

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.errors import ConfigError
from constrained_ft.foreign_names import FOREIGN_NAMES
from constrained_ft.groups import groups
from constrained_ft.keys import ANY_NAME, keys_of_schema

TYPOS, TYPES, BOUNDS, OPTIONS, FOREIGN = 120, 35, 30, 40, 75
# Sections that the smoke run has; of scorers it has the kind `letters`.
PLAIN = ("llm", "auxiliary", "prompts", "trainer", "sampler", "placement", "guard", "evaluation")


@dataclass(frozen=True)
class Mutation:
    """One wrong override, and what its message has to say."""

    override: str
    key: str
    cures: tuple[str, ...]
    """Any of them will do."""


def known_keys() -> list[str]:
    return [
        key.path
        for key in keys_of_schema().values()
        if not key.is_section
        and ANY_NAME not in key.path
        and "scorer" not in key.path
        and "judge" not in key.path
    ]


def misspelt(word: str, draw: random.Random) -> str:
    """Two letters swapped, one left out, one doubled or one changed."""
    place = draw.randrange(1, len(word) - 1)
    return draw.choice(
        [
            word[:place] + word[place + 1] + word[place] + word[place + 2 :],
            word[:place] + word[place + 1 :],
            word[:place] + word[place] + word[place:],
            word[:place] + "x" + word[place + 1 :],
        ]
    )


def typos(draw: random.Random) -> Iterator[Mutation]:
    """A letter wrong in the key, in its section, or in both the key behind a `+`."""
    keys = known_keys()
    for key in draw.sample(keys * 2, len(keys) * 2):
        *section, leaf = key.split(".")
        wrong = misspelt(leaf, draw) if len(leaf) > 3 else leaf + "x"
        if len(section) == 1 and draw.random() < 0.2:
            path = f"{misspelt(section[0], draw)}.{leaf}"
        else:
            path = ".".join([*section, wrong])
        if path not in keys_of_schema() and wrong not in names_of_others():
            yield Mutation(f"{draw.choice(['', '+', '++'])}{path}=1", path, (key,))


def names_of_others() -> set[str]:
    return {name for names in FOREIGN_NAMES.values() for name in names}


def fields() -> dict[str, dict[str, Any]]:
    """The JSON schema of each key of plain sections: independent of what `keys` makes of it."""
    tree = Config.model_json_schema()
    found = {}
    for section in PLAIN:
        name = tree["properties"][section]["$ref"].rsplit("/", 1)[1]
        for key, field in tree["$defs"][name]["properties"].items():
            found[f"{section}.{key}"] = field
    return found


def types(draw: random.Random) -> Iterator[Mutation]:
    wrong = {
        "integer": [("2.5", "whole number"), ("abc", "whole number"), ("[1]", "whole number")],
        "number": [("abc", "a number"), ("true", "a number"), ("null", "a number")],
        "boolean": [("maybe", "true or false"), ("3", "true or false")],
    }
    for key, field in shuffled(fields(), draw):
        if "enum" in field:
            yield Mutation(f"{key}=nonsense", key, (str(field["enum"][0]),))
        for value, cure in wrong.get(str(field.get("type")), []):
            yield Mutation(f"{key}={value}", key, (cure,))


def bounds(draw: random.Random) -> Iterator[Mutation]:
    signs = {"exclusiveMinimum": (0, ">"), "minimum": (-1, "≥"), "maximum": (1, "≤")}
    signs["exclusiveMaximum"] = (0, "<")
    for key, field in shuffled(fields(), draw):
        for name, (beyond, sign) in signs.items():
            if isinstance(limit := field.get(name), int | float):
                yield Mutation(f"{key}={limit + beyond:g}", key, (f"{sign} {limit:g}",))


def options(draw: random.Random) -> Iterator[Mutation]:
    pairs = [(group, option) for group, names in groups().items() for option in names]
    for group, option in draw.sample(pairs, len(pairs)):
        wrong = misspelt(option, draw) if len(option) > 3 else option + "x"
        if wrong not in groups()[group]:
            yield Mutation(f"{group}={wrong}", f"{group}={wrong}", (option,))


def foreign(draw: random.Random) -> Iterator[Mutation]:
    names = sorted((name, ours) for table in FOREIGN_NAMES.values() for name, ours in table.items())
    for name, ours in draw.sample(names, len(names)):
        section = draw.choice(["", "trainer.", "data.", "llm."])
        if f"{section}{name}" not in keys_of_schema():
            yield Mutation(f"{section}{name}=1", f"{section}{name}", (ours,))


def shuffled(
    table: dict[str, dict[str, Any]], draw: random.Random
) -> list[tuple[str, dict[str, Any]]]:
    return draw.sample(list(table.items()), len(table))


@cache
def mutations() -> list[Mutation]:
    draw = random.Random(0)
    found: list[Mutation] = []
    for make, count in (
        (typos, TYPOS),
        (types, TYPES),
        (bounds, BOUNDS),
        (options, OPTIONS),
        (foreign, FOREIGN),
    ):
        some = list(dict.fromkeys(make(draw)))[:count]
        assert len(some) == count, f"{make.__name__} gives {len(some)}"
        found += some
    return found


def answer_to(override: str) -> str:
    try:
        compose(["experiment=smoke", override])
    except ConfigError as error:
        return str(error) if error.exit_code == 2 else f"exit code {error.exit_code}"
    return "nothing: it was accepted"


def test_there_are_300_and_they_differ() -> None:
    assert len({mutation.override for mutation in mutations()}) == 300


def test_each_of_300_wrong_configurations_gets_one_message_with_key_and_cure() -> None:
    faults, slowest = [], 0.0
    compose(["experiment=smoke"])  # imports are those of the first
    gc.disable()  # what other tests have left would be collected in the time of one message
    try:
        for mutation in mutations():
            started = time.thread_time()  # other tests may have left threads at work
            message = answer_to(mutation.override)
            slowest = max(slowest, time.thread_time() - started)
            is_single = "problems:" not in message and "\n" not in message
            is_named = mutation.key in message and any(cure in message for cure in mutation.cures)
            if not (is_single and is_named):
                faults.append(f"{mutation.override}: {message} (wanted {mutation.cures})")
    finally:
        gc.enable()
    assert not faults, f"{len(faults)} of 300:\n" + "\n".join(faults)
    assert slowest < 1.0


def test_the_same_in_a_file_names_the_file_and_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    wrong = [m for m in mutations() if not m.override.startswith(("+", "experiment"))]
    for mutation in random.Random(1).sample(wrong, 15):
        key, _, value = mutation.override.partition("=")
        file.write_text(f"# mine\nexperiment: smoke\n{key}: {value}\n")
        with pytest.raises(ConfigError) as caught:
            compose([], (), file)
        assert f"{file}, line 3: " in str(caught.value)
        assert any(cure in str(caught.value) for cure in mutation.cures)


def test_the_command_says_the_same_and_leaves_with_2(tmp_path: Path) -> None:
    for mutation in mutations()[::75]:
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "constrained_ft.cli.main", "--no-color"),
                *("train", "experiment=smoke", mutation.override),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert ran.returncode == 2, ran.stderr
        assert ran.stdout == ""
        assert ran.stderr.startswith("error: ")
        assert ran.stderr.count("\n") == 1, json.dumps(ran.stderr)
        assert mutation.key in ran.stderr
        assert not [*tmp_path.iterdir()]
