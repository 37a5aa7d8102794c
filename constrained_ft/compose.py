"""Compose the configuration from YAML groups and overrides, or read a resolved one; and write it.

Hydra composes, `config.Config` validates, and every mistake becomes one `ConfigError` that names
the key, what was given, what is allowed, and what to do. Hydra alone accepts a misspelt key behind
a `+` or inside an experiment file. Nothing here imports torch.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from constrained_ft.config import Config
from constrained_ft.config_file import ConfigFile, read_config_file
from constrained_ft.errors import ConfigError
from constrained_ft.groups import CONF, PRIMARY, groups, package_file
from constrained_ft.keys import Tree
from constrained_ft.overrides import key_of, lay_over, normalise
from constrained_ft.validation import refuse_gaps, validated

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["compose", "config_to_yaml", "differences", "flat", "load_config"]


def compose(
    overrides: Sequence[str], config_dirs: Sequence[Path] = (), file: Path | None = None
) -> Config:
    """The configuration of `cft train OVERRIDES`.

    Args:
        overrides: `group=option` and `section.key=value`, as on the command line.
        config_dirs: folders of your own groups and experiments.
        file: a YAML file of options and keys, over which the overrides go.

    Raises:
        ConfigError: naming every key that is wrong and what to do.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("package_file", package_file, replace=True)
    brought = ConfigFile() if file is None else read_config_file(file, config_dirs)
    prepared = normalise(overrides, config_dirs, sweep=False)
    given = [key_of(override) for override in overrides]
    chosen = _options_of(brought, given, config_dirs)
    with _translated_errors():
        with initialize_config_module(CONF, version_base="1.3"):
            tree = hydra_compose(PRIMARY, overrides=[*chosen, *prepared])
        if file is not None:
            _lay_file_under(tree, brought, overrides, config_dirs)
        refuse_gaps(tree)
        return validated(
            OmegaConf.to_container(tree, resolve=True),
            config_dirs,
            lambda key: "" if key in given else brought.place(key),
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a resolved configuration, such as the `config.yaml` of a run folder.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, laid over what the file says.

    Raises:
        ConfigError: if the file is missing, cannot be read or does not fit the schema.
    """
    from hydra.core.utils import setup_globals
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    setup_globals()  # ${now:...}
    OmegaConf.register_new_resolver("package_file", package_file, replace=True)
    with _translated_errors(f"{path}: "):
        tree = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{path} holds no keys; expected the config.yaml of a run")
        lay_over(tree, overrides)
        refuse_gaps(tree)
        return validated(OmegaConf.to_container(tree, resolve=True), (), lambda key: str(path))


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def differences(left: Config, right: Config) -> dict[str, tuple[object, object]]:
    """Keys whose values differ, with both values; None where a side has no such key."""
    one, other = flat(left.model_dump(mode="json")), flat(right.model_dump(mode="json"))
    return {
        key: (one.get(key), other.get(key))
        for key in one | other
        if (key in one, one.get(key)) != (key in other, other.get(key))
    }


def flat(tree: Tree, prefix: str = "") -> Tree:
    """The values of a configuration by their dotted keys."""
    found: Tree = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _options_of(
    brought: ConfigFile, given: Sequence[str], config_dirs: Sequence[Path]
) -> list[str]:
    """The options that a file chooses and the command line does not, as overrides."""
    prepared: list[str] = []
    for group, option in brought.options.items():
        if group in given:
            continue
        try:
            prepared += normalise([f"{group}={option}"], config_dirs, sweep=False)
        except ConfigError as error:
            raise ConfigError(f"{brought.place(group)}: {error}") from None
    return [override for override in prepared if not override.startswith("hydra.")]


def _lay_file_under(
    tree: "DictConfig", brought: ConfigFile, overrides: Sequence[str], config_dirs: Sequence[Path]
) -> None:
    """Set what a file says, then once more what the command line says, which wins."""
    from omegaconf import OmegaConf

    deleted = [key_of(override) for override in overrides if override.startswith("~")]
    for key, value in brought.values.items():
        if key not in deleted:
            OmegaConf.update(tree, key, value, merge=True, force_add=True)
    keys = [o for o in overrides if key_of(o) not in (*groups(config_dirs), *deleted)]
    lay_over(tree, keys)


@contextmanager
def _translated_errors(prefix: str = "") -> Iterator[None]:
    """Turn what Hydra, OmegaConf and the YAML reader raise into a ConfigError."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

    try:
        yield
    except InterpolationKeyError as error:
        raise ConfigError(f"{prefix}{error.full_key}: ${{...}} refers to no key") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{prefix}cannot read the YAML: {error}") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{prefix}{key}{_first_lines(error)}") from error
    except HydraException as error:
        raise ConfigError(prefix + _first_lines(error)) from error


def _first_lines(error: Exception) -> str:
    """The message without Hydra's list of places and OmegaConf's notes."""
    text = re.split(
        r"\n\s*(?:Config search path|full_key|object_type|set the env)", str(error), flags=re.I
    )[0]
    return " ".join(text.split())
