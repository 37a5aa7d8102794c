"""One YAML file that somebody brings: keys in sections or with dots, over the default run.

    llm: pretrained                     # a group and its option
    llm.model_name_or_path: ./model     # a key with its dotted path
    trainer:                            # or keys inside their section
      kl_weight: 20

The options of groups may also stand in a list `defaults`, as in Hydra's files; a section cannot be
both an option and keys under one name, so this is for files in sections. A file that has every
section, such as the config.yaml of a run, is complete and is taken as it stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from constrained_ft.config import Config
from constrained_ft.errors import ConfigError, raise_problems
from constrained_ft.groups import EXPERIMENT, groups
from constrained_ft.keys import find_key
from constrained_ft.suggestions import unknown_key

_DEFAULTS = "defaults"


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What a file says, by dotted key."""

    path: Path = Path()
    options: Mapping[str, str] = field(default_factory=dict)
    """The option of each group that it chooses."""
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    """The line of each option and value."""

    def place(self, key: str) -> str:
        """Where a key, or what is nearest to it, is set: `my.yaml, line 3`; empty for nowhere."""
        parts = key.split(".")
        nearest = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        set_here = {*self.values, *self.options}
        found = [self.lines[name] for name in nearest if name in set_here]
        found += [self.lines[name] for name in set_here if name.startswith(f"{key}.")]
        return f"{self.path}, line {found[0]}" if found else ""


def is_complete(file: Path) -> bool:
    """Whether a file has every section of the schema, such as the config.yaml of a run.

    Raises:
        ConfigError: if there is no such file, or it cannot be read.
    """
    tree = _tree(file)
    sections = [name for name in Config.model_fields if name in groups() or name == "guard"]
    return all(isinstance(tree.get(name), Mapping) for name in sections)


def read_config_file(file: Path, config_dirs: Sequence[Path] = ()) -> ConfigFile:
    """The options and values of a file that is not complete.

    Raises:
        ConfigError: naming the line of each key that is not known, or that is set twice.
    """
    lines, options, values = _lines(file), {}, {}
    problems = []
    for key, value in _flat(_options_first(_tree(file), file), config_dirs):
        where = f"{file}, line {lines.get(key, 1)}"
        known = groups(config_dirs)
        if key in values or key in options:
            problems.append(f"{where}: {key} is set twice; keep one of them")
        elif key in known and isinstance(value, str):
            options[key] = value
        elif key == EXPERIMENT or (key in known and key not in Config.model_fields):
            problems.append(
                f"{where}: {key}: got {value!r}, must be one of {', '.join(known[key])}"
            )
        elif find_key(key) is None:
            problems.append(f"{where}: {unknown_key(key)}")
        else:
            values[key] = value
    raise_problems(problems)
    return ConfigFile(path=file, options=options, values=values, lines=lines)


def _tree(file: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not file.is_file():
        raise ConfigError(f"there is no file {file}; `cft init` writes one")
    try:
        tree = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"cannot read the YAML: {words}; mend this line of {file}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{file} holds no keys; `cft init` writes such a file")
    plain = OmegaConf.to_container(tree)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _options_first(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """The tree with its `defaults` list as options, and the rest."""
    listed = tree.pop(_DEFAULTS, None) or []
    pairs = [item for item in listed if item != "_self_"] if isinstance(listed, list) else [listed]
    if not all(isinstance(pair, dict) and len(pair) == 1 for pair in pairs):
        raise ConfigError(f"{file}: defaults must be a list of `- GROUP: OPTION`")
    chosen = [(str(group), option) for pair in pairs for group, option in pair.items()]
    return {f"{_DEFAULTS}:{g.removeprefix('override ').lstrip('/')}": o for g, o in chosen} | tree


def _flat(tree: Mapping[Any, Any], config_dirs: Sequence[Path], above: str = "") -> Any:
    """Pairs of dotted key and value, sections taken apart as far as the schema knows them."""
    for name, value in tree.items():
        key = f"{above}{name}".removeprefix(f"{_DEFAULTS}:")
        known = find_key(key)
        is_section = known is not None and known.is_section
        if isinstance(value, Mapping) and value and (is_section or known is None):
            yield from _flat(value, config_dirs, f"{key}.")
        else:
            yield key, value


def _lines(file: Path) -> dict[str, int]:
    """The line of each key, by its dotted path, and of each option in `defaults`."""
    import yaml

    found: dict[str, int] = {}

    def visit(node: Any, above: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                key = f"{above}{name.value}"
                found.setdefault(key, name.start_mark.line + 1)
                visit(value, f"{key}.")

    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    visit(root, "")
    for name, value in root.value if isinstance(root, yaml.MappingNode) else []:
        if name.value == _DEFAULTS and isinstance(value, yaml.SequenceNode):
            for item in value.value:
                if isinstance(item, yaml.MappingNode):
                    group = item.value[0][0].value.removeprefix("override ").lstrip("/")
                    found.setdefault(group, item.start_mark.line + 1)
    return {key: line for key, line in found.items() if key != _DEFAULTS}
