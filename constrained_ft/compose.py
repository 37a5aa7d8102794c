"""Compose the configuration from YAML groups and overrides; refuse what the schema does not know.

Hydra composes, `config.Config` validates, and every mistake becomes one `ConfigError` that names
the key, what was given, what is allowed, and what to do. Hydra alone accepts a misspelt key behind
a `+` or inside an experiment file. Nothing here imports torch.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from constrained_ft.config import Config
from constrained_ft.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

__all__ = [
    "Key",
    "assignment",
    "compose",
    "config_to_yaml",
    "default_options",
    "differences",
    "expand_sweep",
    "groups",
    "keys_of_schema",
    "load_config",
    "normalise",
]

CONF = "constrained_ft.conf"
PRIMARY = "train"
# The group whose options may set anything; every other group fills the section of its name.
EXPERIMENT = "experiment"
_ANY_NAME = "<name>"

Tree = dict[str, Any]

# What other tools call it. The value is our key, or a sentence where there is no such key.
FOREIGN_NAMES = {
    "base_model": "llm.model_name_or_path",
    "model": "llm.model_name_or_path",
    "model_path": "llm.model_name_or_path",
    "model_name": "llm.model_name_or_path",
    "pretrained_model_name_or_path": "llm.model_name_or_path",
    "checkpoint_dir": "llm.model_name_or_path",
    "torch_dtype": "llm.dtype",
    "model_dtype": "llm.dtype",
    "flash_attention": "llm.attn_implementation",
    "flash_attn": "llm.attn_implementation",
    "enable_gradient_checkpointing": "llm.gradient_checkpointing",
    "enable_activation_checkpointing": "llm.gradient_checkpointing",
    "peft": "llm.lora",
    "use_peft": "llm.lora (null trains all weights)",
    "lora_r": "llm.lora.r",
    "lora_rank": "llm.lora.r",
    "lora_alpha": "llm.lora.alpha",
    "lora_dropout": "llm.lora.dropout",
    "lora_target": "llm.lora.target_modules",
    "lora_target_modules": "llm.lora.target_modules",
    "lora_target_linear": "llm.lora.target_modules=all-linear",
    "lr": "trainer.learning_rate",
    "wd": "trainer.weight_decay",
    "batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size_per_gpu": "trainer.per_device_train_batch_size",
    "train_batch_size": "trainer.per_device_train_batch_size",
    "grad_accum": "trainer.gradient_accumulation_steps",
    "accumulate_grad_batches": "trainer.gradient_accumulation_steps",
    "lr_scheduler_type": "trainer.lr_scheduler",
    "lr_warmup_steps": "trainer.warmup_steps",
    "num_warmup_steps": "trainer.warmup_steps",
    "warmup_ratio": "trainer.warmup_steps (a number of steps)",
    "max_norm": "trainer.max_grad_norm",
    "clip_grad": "trainer.max_grad_norm",
    "clip_grad_norm": "trainer.max_grad_norm",
    "gradient_clip_val": "trainer.max_grad_norm",
    "bf16": "trainer.precision=bf16",
    "fp16": "trainer.precision (bf16 or fp32)",
    "mixed_precision": "trainer.precision",
    "lambda": "trainer.kl_weight",
    "kl_coef": "trainer.kl_weight",
    "kl_loss_coef": "trainer.kl_weight",
    "init_kl_coef": "trainer.kl_weight",
    "beta": "trainer.kl_weight, the weight of the KL (constraint.beta is the tilt)",
    "max_steps": "trainer.iterations times trainer.steps_per_iteration",
    "num_train_epochs": "trainer.iterations times trainer.steps_per_iteration",
    "num_epochs": "trainer.iterations times trainer.steps_per_iteration",
    "epochs": "trainer.iterations times trainer.steps_per_iteration",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "block_size": "data.max_length",
    "dataset": "data.path (a file) or data.name (a hub dataset)",
    "datasets": "data.sources",
    "dataset_name": "data.name",
    "dataset_path": "data.path",
    "train_file": "data.path",
    "train_files": "data.path",
    "val_set_size": "data.validation_share",
    "max_completion_length": "prompts.max_new_tokens",
    "response_length": "prompts.max_new_tokens",
    "max_response_length": "prompts.max_new_tokens",
    "num_generations": "prompts.samples_per_prompt",
    "rollout_n": "prompts.samples_per_prompt",
    "num_return_sequences": "prompts.samples_per_prompt",
    "reward_model": "constraint.scorer",
    "reward_funcs": "constraint.scorer (kind=function, path=FILE.py:FUNCTION)",
    "reward_function": "constraint.scorer (kind=function, path=FILE.py:FUNCTION)",
    "delta": "constraint.threshold",
    "output": "output_dir",
    "out_dir": "output_dir",
    "run_name": "name",
    "experiment_name": "name",
    "random_seed": "seed",
    "target_kl": "guard.kl_limit",
}

# Some rules speak of sections; these sentences say what to type.
_HINTS = {
    "data": "for a corpus of your own: data=file data.path=FILE, or data=hub data.name=NAME",
    "prompts": "for prompts of your own: prompts=file prompts.path=FILE, or prompts=corpus",
}


# --- the schema, as a list of keys --------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of the schema."""

    path: str
    """Dotted; `<name>` stands for a name of the user's."""
    allowed: str
    """What it may be, in words."""
    doc: str
    """What it means, and in which unit."""
    is_section: bool


@cache
def _schema() -> Tree:
    return Config.model_json_schema()


def _resolved(node: Tree) -> Tree:
    """The node with a reference to a shared definition followed."""
    if "$ref" not in node:
        return node
    shared: Tree = _schema()["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return shared | {k: v for k, v in node.items() if k != "$ref"}


def _options(node: Tree) -> list[Tree]:
    """The alternatives of a node, flat: a section, several sections, a value, or null."""
    node = _resolved(node)
    alternatives = node.get("anyOf") or node.get("oneOf")
    if alternatives is None:
        return [node]
    return [option for alternative in alternatives for option in _options(alternative)]


def _children(node: Tree) -> dict[str, list[Tree]]:
    """Key names one level below a node, each with its nodes (several for a union of sections)."""
    found: dict[str, list[Tree]] = {}
    for option in _options(node):
        for name, child in option.get("properties", {}).items():
            found.setdefault(name, []).append(child)
        if isinstance(option.get("additionalProperties"), dict):
            found.setdefault(_ANY_NAME, []).append(option["additionalProperties"])
    return found


def _literals(options: Sequence[Tree]) -> list[str]:
    found = [v for o in options for v in ([o["const"]] if "const" in o else o.get("enum", []))]
    return list(dict.fromkeys(str(v) for v in found))


def _bounds(option: Tree) -> str:
    words = [
        f"{sign} {option[name]:g}"
        for name, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if name in option
    ]
    return " " + " and ".join(words) if words else ""


def _allowed(nodes: Sequence[Tree]) -> str:
    """What a key may be, in words."""
    options = [option for node in nodes for option in _options(node)]
    literals = _literals(options)
    words = [f"one of {', '.join(literals)}"] if len(literals) > 1 else literals
    for option in options:
        if "const" in option or "enum" in option:
            continue
        match option.get("type"):
            case "integer":
                word = "a whole number" + _bounds(option)
            case "number":
                word = "a number" + _bounds(option)
            case "boolean":
                word = "true or false"
            case "null":
                word = "null"
            case "array":
                word = "a list"
            case "object":
                word = "a section"
            case _:
                word = "one character" if option.get("maxLength") == 1 else "text"
                word += f" that matches {option['pattern']}" if "pattern" in option else ""
        if word not in words:
            words.append(word)
    return " or ".join(words)


def _walk(nodes: Sequence[Tree], path: str) -> Iterator[Key]:
    merged: dict[str, list[Tree]] = {}
    for node in nodes:
        for name, children in _children(node).items():
            merged.setdefault(name, []).extend(children)
    if path:
        docs = [_resolved(node).get("description", "") for node in nodes]
        doc = " · ".join(dict.fromkeys(" ".join(d.split()) for d in docs if d))
        yield Key(path, _allowed(nodes), doc, bool(merged))
    for name, children in merged.items():
        yield from _walk(children, f"{path}.{name}" if path else name)


@cache
def keys_of_schema() -> dict[str, Key]:
    """Every key and section of the configuration by its dotted path, in the schema's order."""
    return {key.path: key for key in _walk([_schema()], "")}


def _known(path: str) -> Key | None:
    """The key of a dotted path; `<name>` in the schema matches any name."""
    keys = keys_of_schema()
    if path in keys:
        return keys[path]
    parts = path.split(".")
    for key in keys.values():
        expected = key.path.split(".")
        if _ANY_NAME in expected and len(expected) == len(parts):
            pairs = zip(expected, parts, strict=True)
            if all(e in (_ANY_NAME, p) for e, p in pairs):
                return key
    return None


def _suggestion(path: str) -> str:
    """What may have been meant by a path that the schema does not know."""
    *parents, leaf = path.split(".")
    beside = _close(leaf, _siblings(parents))
    if beside is not None:
        return f"did you mean {'.'.join([*parents, beside])}?"
    foreign = _close(leaf.lower(), FOREIGN_NAMES)
    if foreign is not None:
        return f"here it is called {FOREIGN_NAMES[foreign]}"
    keys = [key for key in keys_of_schema() if not path.startswith(key + ".")]
    same_leaf = [key for key in keys if key.rsplit(".", 1)[-1] == leaf and _ANY_NAME not in key]
    if same_leaf:
        return f"did you mean {' or '.join(same_leaf[:3])}?"
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    near = _close(path, keys) or by_leaf.get(_close(leaf, by_leaf) or "")
    return f"did you mean {near}?" if near else "`cft config list` shows every key"


def _siblings(parents: list[str]) -> list[str]:
    prefix = "".join(part + "." for part in parents)
    return [
        key.removeprefix(prefix)
        for key in keys_of_schema()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    ]


def _close(word: str, words: Sequence[str] | Mapping[str, object]) -> str | None:
    found = difflib.get_close_matches(word, [*words], n=1, cutoff=0.7)
    return found[0] if found else None


# --- compose ------------------------------------------------------------------------------------


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Config:
    """The configuration of `cft train OVERRIDES`.

    Args:
        overrides: `group=option` and `section.key=value`, as on the command line.
        config_dirs: folders of your own groups and experiments.

    Raises:
        ConfigError: naming every key that is wrong and what to do.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)
    prepared = normalise(overrides, config_dirs, sweep=False)
    with _translated_errors():
        with initialize_config_module(CONF, version_base="1.3"):
            tree = hydra_compose(PRIMARY, overrides=prepared)
        _refuse_gaps(tree)
        return _validated(OmegaConf.to_container(tree, resolve=True), config_dirs)


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
    _check_folders(config_dirs)
    prepared, problems = [], []
    for override in _parse(overrides):
        try:
            prepared += _prepare(override, groups(config_dirs), sweep=sweep)
        except ConfigError as problem:
            problems.append(str(problem))
    _raise_problems(problems)
    if config_dirs:
        places = ",".join(_quoted(f"file://{folder.resolve()}") for folder in config_dirs)
        prepared.append(f"hydra.searchpath=[{places}]")
    return prepared


def _check_folders(config_dirs: Sequence[Path]) -> None:
    """Folders of configuration must exist, and no two files may share a name."""
    owners: dict[Path, Path] = {}
    for folder in (Path(_package_file("")), *config_dirs):
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


def groups(config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Every group and its options: ours, and those of the user's folders."""
    found: dict[str, set[str]] = {}
    for root in (Path(_package_file("")), *config_dirs):
        for file in root.glob("*/**/*.yaml"):
            group, *option = file.relative_to(root).with_suffix("").parts
            found.setdefault(group, set()).add("/".join(option))
    ours_first = [name for name in (*Config.model_fields, EXPERIMENT) if name in found]
    return {name: sorted(found[name]) for name in dict.fromkeys([*ours_first, *sorted(found)])}


def default_options() -> dict[str, str | None]:
    """The option of each group that `cft train` starts with."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.to_container(OmegaConf.load(_package_file(f"{PRIMARY}.yaml")))
    assert isinstance(defaults, dict)
    pairs = [item for item in defaults["defaults"] if isinstance(item, dict)]
    return {str(group): option for pair in pairs for group, option in pair.items()}


def assignment(key: str, value: str) -> str:
    """`key=value` for a text, quoted where the override syntax would read it differently."""
    is_plain = re.fullmatch(r"[A-Za-z_/.][\w/.-]*", value) is not None
    return f"{key}={value if is_plain else _quoted(value)}"


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
    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)
    with _translated_errors(f"{path}: "):
        tree = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{path} holds no keys; expected the config.yaml of a run")
        _lay_over(tree, overrides)
        _refuse_gaps(tree)
        return _validated(OmegaConf.to_container(tree, resolve=True), (), str(path))


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def differences(left: Config, right: Config) -> dict[str, tuple[object, object]]:
    """Keys whose values differ, with both values; None where a side has no such key."""
    one, other = _flat(left.model_dump(mode="json")), _flat(right.model_dump(mode="json"))
    return {
        key: (one.get(key), other.get(key))
        for key in one | other
        if (key in one, one.get(key)) != (key in other, other.get(key))
    }


def _flat(tree: Tree, prefix: str = "") -> Tree:
    found: Tree = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _package_file(name: str) -> str:
    """`${package_file:NAME}`: the path of a file that is installed beside the YAML groups."""
    return str(files(CONF).joinpath(name))


# --- overrides ----------------------------------------------------------------------------------


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
    if _known(name) is None:
        raise ConfigError(_unknown(name))
    # `++` sets a key whether or not the chosen option lists it: the schema is the judge.
    return [f"{'~' if override.is_delete() else '++'}{text.lstrip('+~')}"]


def _check_options(override: "Override", options: list[str]) -> None:
    group = override.key_or_group
    for choice in _choices(override, {group: options}):
        value = "" if override.is_delete() else choice.partition("=")[2].strip("'\"")
        for option in value.strip("[]").split(","):
            if option.strip() in options:
                continue
            near = _close(option, options)
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


def _lay_over(tree: "DictConfig", overrides: Sequence[str]) -> None:
    """Set keys in a resolved configuration."""
    from omegaconf import OmegaConf

    for override in _parse(overrides):
        name = override.key_or_group
        if name in groups() and not isinstance(override.value(), dict):
            raise ConfigError(
                f"{override.input_line}: a configuration file is already composed, so no option "
                f"can be chosen; set single keys with {name}.KEY=VALUE, or leave --config out"
            )
        if _known(name) is None:
            raise ConfigError(_unknown(name))
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: write {name}=VALUE, one value")
        OmegaConf.update(tree, name, override.value(), merge=True, force_add=True)


# --- validation and its messages ----------------------------------------------------------------


def _refuse_gaps(tree: "DictConfig") -> None:
    """A `???` is a value that only the user can give."""
    from omegaconf import OmegaConf

    gaps = sorted(OmegaConf.missing_keys(tree))
    _raise_problems([f"{gap} is not set: {_how_to_set(gap)}" for gap in gaps])


def _how_to_set(path: str) -> str:
    key = _known(path)
    if key is None:
        return f"give {path}=VALUE"
    if key.is_section:
        return f"choose one with {path}=OPTION" if "." not in path else f"give {path}.KEY=VALUE"
    doc = f" ({key.doc})" if key.doc else ""
    return f"give {path}=VALUE, {key.allowed}{doc}"


def _validated(tree: Any, config_dirs: Sequence[Path] = (), file: str = "") -> Config:
    try:
        # JSON and strict: no text becomes a number, no `true` becomes 1.
        return Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        found = [(_place(item["loc"]), item) for item in error.errors(include_url=False)]
    if len([item for _, item in found if item["type"] == "missing"]) > 3 and file:
        raise ConfigError(
            f"{file} is not a complete configuration: {found[0][0]} is missing. --config takes the "
            "config.yaml of a run; a file of a few changes goes into a folder, as "
            "DIR/experiment/NAME.yaml, and is used with --config-dir DIR experiment=NAME"
        ) from None
    # A union reports one problem for each of its members.
    lines = {
        (path, item["type"] == "missing"): _explain(path, item, tree, config_dirs)
        for path, item in found
    }
    _raise_problems([f"{file}: {line}" if file else line for line in lines.values()])
    raise AssertionError("a validation error has at least one problem")


def _place(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a place in the schema, without the names of union members."""
    nodes: list[Tree] = [_schema()]
    path: list[str] = []
    for part in loc:
        resolved = [_resolved(node) for node in nodes]
        tagged = [
            o
            for n in resolved
            for o in (n, *map(_resolved, n.get("anyOf", [])))
            if "discriminator" in o
        ]
        if tagged:  # this part is the `kind`
            nodes = [{"$ref": tagged[0]["discriminator"]["mapping"][part]}]
            continue
        children: dict[str, list[Tree]] = {}
        for node in nodes:
            children |= _children(node)
        if not children:
            break
        path.append(str(part))
        nodes = children.get(str(part), children.get(_ANY_NAME, []))
    return ".".join(path)


def _explain(path: str, item: Any, tree: Tree, config_dirs: Sequence[Path]) -> str:
    """One line about one problem."""
    key = _known(path)
    match item["type"]:
        case "extra_forbidden" if key is not None:
            parent = path.rpartition(".")[0]
            kind = _value(tree, f"{parent}.kind")
            return f"{path}: {parent}.kind={kind} has no such key; remove it with ~{path}"
        case "extra_forbidden":
            return _unknown(path, config_dirs)
        case "missing":
            return f"{path} is missing: {_how_to_set(path)}"
        case "value_error":
            hint = _HINTS.get(path, "")
            return f"{path}: {item['ctx']['error']}" + (f" ({hint})" if hint else "")
        case "union_tag_not_found":
            return f"{path}.kind is missing: {_how_to_set(path + '.kind')}"
        case "union_tag_invalid":
            path += ".kind"
    key, got = _known(path), _value(tree, path)
    allowed = key.allowed if key else "something else"
    line = f"{path}: got {_shown(got)}, must be {allowed}"
    if "text" in allowed and isinstance(got, bool | int | float):
        line += f"; to give it as text: {path}=\"'{_shown(got)}'\""
    return line


def _unknown(path: str, config_dirs: Sequence[Path] = ()) -> str:
    places = [
        str(f)
        for folder in config_dirs
        for f in sorted(folder.rglob("*.yaml"))
        if _sets(f, folder, path)
    ]
    where = f" (in {', '.join(places)})" if places else ""
    return f"unknown key {path}{where}; {_suggestion(path)}"


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


def _raise_problems(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems:", *(f"  {p}" for p in problems)]))


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
