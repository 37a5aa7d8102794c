"""What may have been meant by a name that is not known: a near one, or what other tools call it."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from constrained_ft.foreign_names import FOREIGN_NAMES, is_foreign, our_name, tools_with
from constrained_ft.keys import ANY_NAME, keys_of_schema


def unknown_key(path: str, config_dirs: Sequence[Path] = ()) -> str:
    """The message about a key that the schema does not know: where it is set, what was meant."""
    places = [
        str(f)
        for folder in config_dirs
        for f in sorted(folder.rglob("*.yaml"))
        if _sets(f, folder, path)
    ]
    where = f" (in {', '.join(places)})" if places else ""
    return f"unknown key {path}{where}; {_suggestion(path)}"


def _suggestion(path: str) -> str:
    """What may have been meant by a path that the schema does not know."""
    *parents, leaf = path.split(".")
    sections = [key.path for key in keys_of_schema().values() if key.is_section]
    meant = closest(".".join(parents), sections)
    if f"{meant}.{leaf}" in keys_of_schema():
        return f"did you mean {meant}.{leaf}?"
    if is_foreign(leaf):
        return _translated(leaf)
    beside = closest(leaf, _siblings(parents))
    if beside is not None:
        return f"did you mean {'.'.join([*parents, beside])}?"
    foreign = closest(leaf.lower(), [name for names in FOREIGN_NAMES.values() for name in names])
    if foreign is not None:
        return _translated(foreign)
    keys = [key for key in keys_of_schema() if not path.startswith(key + ".")]
    same_leaf = [key for key in keys if key.rsplit(".", 1)[-1] == leaf and ANY_NAME not in key]
    if same_leaf:
        return f"did you mean {' or '.join(same_leaf[:3])}?"
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    near = closest(path, keys) or by_leaf.get(closest(leaf, by_leaf) or "")
    return f"did you mean {near}?" if near else "`cft config list` shows every key"


def _translated(name: str) -> str:
    """Our name for what other tools call so, or what to do instead."""
    ours, tools = our_name(name), tools_with(name)
    verb = "here there is" if ours.startswith("no key") else "here it is called"
    whose = f" ({name} is the name in {' and '.join(tools)})" if tools else ""
    return f"{verb} {ours}{whose}"


def _siblings(parents: list[str]) -> list[str]:
    prefix = "".join(part + "." for part in parents)
    return [
        key.removeprefix(prefix)
        for key in keys_of_schema()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    ]


def closest(word: str, words: Sequence[str] | Mapping[str, object]) -> str | None:
    """The word nearest to a misspelt one, if any is near."""
    found = difflib.get_close_matches(word, [*words], n=1, cutoff=0.7)
    return found[0] if found else None


def _sets(file: Path, folder: Path, path: str) -> bool:
    """Whether a YAML file of the user's sets a key."""
    from omegaconf import DictConfig, OmegaConf

    group = ".".join(file.relative_to(folder).parts[:-1])
    is_global = "@package _global_" in file.read_text().partition("\n")[0]
    tree = OmegaConf.load(file)
    inside = path if is_global or not group else path.removeprefix(f"{group}.")
    return (
        isinstance(tree, DictConfig)
        and OmegaConf.select(tree, inside, throw_on_missing=False) is not None
    )
