"""The folders of YAML groups, ours and the user's: which groups and options there are."""

import difflib
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from constrained_ft.config import Config
from constrained_ft.errors import ConfigError

CONF = "constrained_ft.conf"
PRIMARY = "train"
# The group whose options may set anything; every other group fills the section of its name.
EXPERIMENT = "experiment"


def groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Every group and its options: ours, and those of the user's folders."""
    found: dict[str, set[str]] = {}
    for root in (Path(package_file("")), *config_dirs):
        for file in root.glob("*/**/*.yaml"):
            group, *option = file.relative_to(root).with_suffix("").parts
            found.setdefault(group, set()).add("/".join(option))
    ours_first = [name for name in (*Config.model_fields, EXPERIMENT) if name in found]
    return {name: sorted(found[name]) for name in dict.fromkeys([*ours_first, *sorted(found)])}


def default_options() -> dict[str, str | None]:
    """The option of each group that `cft train` starts with."""
    tree = yaml.safe_load(Path(package_file(f"{PRIMARY}.yaml")).read_text(encoding="utf-8"))
    pairs = [item for item in tree["defaults"] if isinstance(item, dict)]
    return {str(group): option for pair in pairs for group, option in pair.items()}


def check_folders(config_dirs: Sequence[Path]) -> None:
    """Folders of configuration must exist, and no two files may share a name."""
    owners: dict[Path, Path] = {}
    for folder in (Path(package_file("")), *config_dirs):
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: there is no such folder")
        for file in folder.rglob("*.yaml"):
            name = file.relative_to(folder)
            if name in owners:
                # Hydra would take the first and be silent about the second.
                raise ConfigError(
                    f"{file} has the name of {owners[name]}; give it another name, "
                    f"such as {name.with_stem('my_' + name.stem)}"
                )
            owners[name] = file


def copy_option(group: str, option: str, folder: Path, name: str) -> Path:
    """Copy a file of ours into a folder of the user's, under a name of its own.

    Raises:
        ConfigError: if there is no such file, or the new one is there already.
    """
    ours = groups()
    if option not in ours.get(group, []):
        listed = [f"{one}/{other}" for one, options in ours.items() for other in options]
        near = difflib.get_close_matches(f"{group}/{option}", listed, n=1)
        meant = f"did you mean {near[0]}?" if near else "`cft config list` shows all of them"
        raise ConfigError(f"{group}/{option}: no such file comes with cft; {meant}")
    if name in ours[group] or Path(name).name != name:
        raise ConfigError(f"--as {name}: give a name that cft has not itself, such as my_{option}")
    file = folder / group / f"{name}.yaml"
    if file.exists():
        raise ConfigError(f"{file} exists; give the copy another name with --as NAME")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package_file(f"{group}/{option}.yaml"), file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}; choose a FOLDER") from None
    return file


def package_file(name: str) -> str:
    """`${package_file:NAME}`: the path of a file that is installed beside the YAML groups."""
    return str(files(CONF).joinpath(name))
