"""Overrides, `group=option` and `section.key=value`: read, checked, put as Hydra takes them."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constrained_ft.config import Config
from constrained_ft.errors import ConfigError, raise_problems
from constrained_ft.groups import EXPERIMENT, check_folders, groups
from constrained_ft.keys import find_key
from constrained_ft.suggestions import closest, unknown_key

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


def normalise(
    overrides: Sequence[str], config_dirs: Sequence[Path] = (), *, sweep: bool
) -> list[str]:
    """Check overrides against groups and schema, and put them as Hydra itself accepts them.

    Args:
        overrides: as on the command line.
        config_dirs: folders of your own groups and experiments.
        sweep: whether a value may be a list of choices, and `hydra.` keys may be set.

    Raises:
        ConfigError: naming every override that is wrong.
    """
    check_folders(config_dirs)
    prepared, problems = [], []
    for override in _parse(overrides):
        try:
            prepared += _prepare(override, groups(config_dirs), sweep=sweep)
        except ConfigError as problem:
            problems.append(str(problem))
    raise_problems(problems)
    if config_dirs:
        places = ",".join(_quoted(f"file://{folder.resolve()}") for folder in config_dirs)
        prepared.append(f"hydra.searchpath=[{places}]")
    return prepared


def expand_sweep(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> list[list[str]]:
    """The overrides of every job of a grid sweep, without the launcher's own `hydra.` keys.

    Raises:
        ConfigError: for an override that cannot be read.
    """
    choices = [
        _choices(override, groups(config_dirs))
        for override in _parse(overrides)
        if not override.is_hydra_override()
    ]
    return [list(job) for job in product(*choices)]


def lay_over(tree: "DictConfig", overrides: Sequence[str]) -> None:
    """Set keys in a resolved configuration.

    Raises:
        ConfigError: for an override that is not `section.key=value`.
    """
    from omegaconf import OmegaConf

    for override in _parse(overrides):
        name = override.key_or_group
        if name in groups() and not isinstance(override.value(), dict):
            raise ConfigError(
                f"{override.input_line}: a configuration file is already composed, so no option "
                f"can be chosen; set single keys with {name}.KEY=VALUE, or leave --config out"
            )
        if find_key(name) is None:
            raise ConfigError(unknown_key(name))
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: write {name}=VALUE, one value")
        OmegaConf.update(tree, name, override.value(), merge=True, force_add=True)


def key_of(override: str) -> str:
    """The key or group that an override sets or deletes."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """What each override sets, by its key or group.

    Raises:
        ConfigError: for an override that cannot be read.
    """
    return {override.key_or_group: override.value() for override in _parse(overrides)}


def assignment(key: str, value: str) -> str:
    """`key=value` for a text, quoted where the override syntax would read it differently."""
    is_plain = re.fullmatch(r"[A-Za-z_/.][\w/.-]*", value) is not None
    return f"{key}={value if is_plain else _quoted(value)}"


def _parse(overrides: Sequence[str]) -> "list[Override]":
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        key, equals, value = text.partition("=")
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            # Values are often paths and texts; what is no literal, list or mapping is plain text.
            try:
                parsed += parser.parse_overrides([f"{key}{equals}{_quoted(value)}"])
            except HydraException:
                raise ConfigError(
                    f"cannot read {text!r}: write KEY=VALUE or GROUP=OPTION"
                ) from None
        if not equals and not parsed[-1].is_delete():
            raise ConfigError(f"cannot read {text!r}: write KEY=VALUE or GROUP=OPTION")
    return parsed


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "\\'") + "'"


def _prepare(override: "Override", options: Mapping[str, list[str]], *, sweep: bool) -> list[str]:
    """One override as Hydra accepts it (or none, where it changes nothing), or a ConfigError."""
    name, text = override.key_or_group, override.input_line or override.key_or_group
    if override.is_hydra_override():
        if not sweep:
            raise ConfigError(f"{text}: `hydra.` keys belong to sweeps; add -m")
        return [text]
    if override.package is not None:
        raise ConfigError(f"{text}: write it without @{override.package}")
    if override.is_sweep_override() and not sweep:
        raise ConfigError(
            f"{text}: several values are a sweep; add -m, or quote one text that has a comma: "
            f"{name}=\"'...'\""
        )
    if name in options:
        if name == EXPERIMENT and (override.is_delete() or override.value() is None):
            return []  # there is none unless one is asked for
        _check_options(override, options[name])
        own = name not in Config.model_fields and name != EXPERIMENT
        return [f"{'+' * own}{text.lstrip('+~')}"]
    if find_key(name) is None:
        raise ConfigError(unknown_key(name))
    # `++` sets a key whether or not the chosen option lists it: the schema is the judge.
    return [f"{'~' if override.is_delete() else '++'}{text.lstrip('+~')}"]


def _check_options(override: "Override", options: list[str]) -> None:
    group = override.key_or_group
    for choice in _choices(override, {group: options}):
        value = "" if override.is_delete() else choice.partition("=")[2].strip("'\"")
        for option in value.strip("[]").split(","):
            if option.strip() in options:
                continue
            near = closest(option, options)
            meant = f"did you mean {near}? " if near else _by_path(group, option)
            others = (
                "or name a folder of your own with --config-dir"
                if group == EXPERIMENT
                else f"or set one key with {group}.KEY=VALUE"
            )
            raise ConfigError(
                f"{override.input_line}: there is no such option; {meant}choose one of "
                f"{', '.join(options)}, {others}"
            )


def _by_path(group: str, value: str) -> str:
    """What to write where the name of an option was expected and a path or hub id was given."""
    match group:
        case "llm" if "." in value or "/" in value:
            return f"for a model of your own: llm=pretrained llm.model_name_or_path={value}; "
        case "data" | "prompts" if "." in value or "/" in value:
            return f"for a file of your own: {group}=file {group}.path={value}; "
        case _:
            return ""


def _choices(override: "Override", options: Mapping[str, list[str]]) -> list[str]:
    """The single overrides that a sweep over one key stands for."""
    from hydra.core.override_parser.types import ValueType

    name, text = override.key_or_group, override.input_line or ""
    if override.value_type == ValueType.INTERVAL_SWEEP or not override.is_sweep_override():
        return [text]
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        glob: Any = override.value()
        return [f"{name}={option}" for option in glob.filter(options.get(name, []))]
    return [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()]
