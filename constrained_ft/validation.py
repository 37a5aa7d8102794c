"""A composed tree → a `Config`, or one error that names every key that is wrong and what to do."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from constrained_ft.config import Config
from constrained_ft.errors import ConfigError, raise_problems
from constrained_ft.keys import Tree, dotted_path, find_key
from constrained_ft.suggestions import unknown_key

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Some rules speak of sections; these sentences say what to type.
_HINTS = {
    "data": "for a corpus of your own: data=file data.path=FILE, or data=hub data.name=NAME",
    "prompts": "for prompts of your own: prompts=file prompts.path=FILE, or prompts=corpus",
}


def refuse_gaps(tree: "DictConfig") -> None:
    """A `???` is a value that only the user can give."""
    from omegaconf import OmegaConf

    gaps = sorted(OmegaConf.missing_keys(tree))
    raise_problems([f"{gap} is not set: {_how_to_set(gap)}" for gap in gaps])


def validated(
    tree: Any, config_dirs: Sequence[Path] = (), place: Callable[[str], str] = lambda key: ""
) -> Config:
    """The configuration of a composed tree.

    Args:
        tree: plain dicts, lists and values.
        config_dirs: folders of the user's, where an unknown key may come from.
        place: the file, or its line, that sets a key, to be named; empty for the command line.

    Raises:
        ConfigError: naming every key that is wrong.
    """
    try:
        # JSON and strict: no text becomes a number, no `true` becomes 1.
        return Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        found = [(dotted_path(item["loc"]), item) for item in error.errors(include_url=False)]
    missing = [path for path, item in found if item["type"] == "missing"]
    if len(missing) > 3 and place(""):
        raise ConfigError(
            f"{place('')} is not a complete configuration: {missing[0]} is missing; give the "
            "config.yaml of a run, or a file of a few keys to `cft train --config`"
        )
    # A union reports one problem for each of its members.
    lines = {
        (path, item["type"] == "missing"): (place(path), _explain(path, item, tree, config_dirs))
        for path, item in found
    }
    raise_problems([f"{where}: {line}" if where else line for where, line in lines.values()])
    raise AssertionError("a validation error has at least one problem")


def _how_to_set(path: str) -> str:
    key = find_key(path)
    if key is None:
        return f"give {path}=VALUE"
    if key.is_section:
        return f"choose one with {path}=OPTION" if "." not in path else f"give {path}.KEY=VALUE"
    doc = f" ({key.doc})" if key.doc else ""
    return f"give {path}=VALUE, {key.allowed}{doc}"


def _explain(path: str, item: Any, tree: Tree, config_dirs: Sequence[Path]) -> str:
    """One line about one problem."""
    key = find_key(path)
    match item["type"]:
        case "extra_forbidden" if key is not None:
            parent = path.rpartition(".")[0]
            kind = _value(tree, f"{parent}.kind")
            return f"{path}: {parent}.kind={kind} has no such key; remove it with ~{path}"
        case "extra_forbidden":
            return unknown_key(path, config_dirs)
        case "missing":
            return f"{path} is missing: {_how_to_set(path)}"
        case "value_error":
            hint = _HINTS.get(path, "")
            where = f"{path}: " if path else ""  # rules across sections name their keys themselves
            return f"{where}{item['ctx']['error']}" + (f" ({hint})" if hint else "")
        case "union_tag_not_found":
            return f"{path}.kind is missing: {_how_to_set(path + '.kind')}"
        case "union_tag_invalid":
            path += ".kind"
    key, got = find_key(path), _value(tree, path)
    allowed = key.allowed if key else "something else"
    line = f"{path}: got {_shown(got)}, must be {allowed}"
    if "text" in allowed and isinstance(got, bool | int | float):
        line += f"; to give it as text: {path}=\"'{_shown(got)}'\""
    return line


def _value(tree: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _shown(value: object) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, dict):
        return "keys"
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)
