"""Tab completion of groups, options and keys; the shell asks for it at every press of the key.

Neither torch nor Hydra is loaded here.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

__all__ = ["complete_copied", "complete_override", "complete_section"]


def complete_override(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """`GROUP=OPTION` and `SECTION.KEY=VALUE`, one section at a time, each with its meaning.

    Bash splits words at `=`: there the key is a word of its own, before the one to complete.
    """
    given: list[str] = context.params.get("overrides") or []
    folders = [folder for folder in context.params.get("config_dir") or [] if folder.is_dir()]
    if given and given[-1] == "=":
        return [*_values(given[-2], incomplete, folders)] if len(given) > 1 else []
    if given and "=" not in given[-1] and not incomplete:  # right behind the `=`, Typer hides it
        return [*_values(given[-1], "", folders)]
    key, equals, value = incomplete.partition("=")
    if equals:
        return [(f"{key}={one}", text) for one, text in _values(key, value, folders)]
    found = [*_names(incomplete, folders)]
    if len(found) == 1 and found[0][0].endswith("="):
        # With one word only, shells add a blank behind it.
        key = found[0][0].removesuffix("=")
        found += [(f"{key}={one}", text) for one, text in _values(key, "", folders)]
    return found


def complete_section(incomplete: str) -> list[tuple[str, str]]:
    """Sections and keys, one section at a time."""
    return [(name.rstrip("=."), meaning) for name, meaning in _keys(incomplete)]


def complete_copied(incomplete: str) -> list[str]:
    """`GROUP/NAME` of the files that come with cft."""
    from constrained_ft.groups import groups

    names = [f"{group}/{option}" for group, options in groups().items() for option in options]
    return [name for name in names if name.startswith(incomplete)]


def _names(begin: str, config_dirs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    from constrained_ft.groups import groups

    for group, options in groups(config_dirs).items():
        if group.startswith(begin):
            yield f"{group}=", " · ".join(options)
    yield from _keys(begin)


def _keys(begin: str) -> Iterator[tuple[str, str]]:
    """The keys and sections that begin so, down to the next dot."""
    from constrained_ft.keys import ANY_NAME, keys_of_schema

    depth = begin.count(".")
    for key in keys_of_schema().values():
        is_next = key.path.count(".") == depth and ANY_NAME not in key.path
        if is_next and key.path.startswith(begin):
            yield key.path + ("." if key.is_section else "="), _first_sentence(key.doc)


def _values(name: str, begin: str, config_dirs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Options of a group, or the words that a key may be."""
    from constrained_ft.groups import groups
    from constrained_ft.keys import find_key

    name = name.lstrip("+")
    known, key = groups(config_dirs), find_key(name)
    words = list(known.get(name, []))
    if not words and key is not None:
        words = _words(key.allowed)
    for word in words:
        if word.startswith(begin):
            yield word, "" if key is None else _first_sentence(key.doc)


def _words(allowed: str) -> list[str]:
    """`one of a, b or true or false or null` → a, b, true, false, null."""
    alternatives = allowed.removeprefix("one of ").split(" or ")
    listed = [word.strip() for one in alternatives for word in one.split(",")]
    prose = re.compile(r"\s|^text$")
    return [word for word in listed if word and not prose.search(word)]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:;])\s", text, maxsplit=1)[0].rstrip(".:;")
