"""The JSON Schema of the files that people write, for their editors: what --config takes."""

import re
from typing import Any

from constrained_ft.config import Config
from constrained_ft.groups import EXPERIMENT, groups
from constrained_ft.keys import ANY_NAME, Key, keys_of_schema

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NAME = "[A-Za-z][A-Za-z0-9_-]*"


def json_schema() -> dict[str, Any]:
    """A file of options and keys, in sections or with dots, or a complete configuration.

    Nothing is required in it, as what is left out comes from the default run.
    """
    tree = Config.model_json_schema()
    definitions = {name: _open(section) for name, section in tree.pop("$defs").items()}
    properties = dict(tree["properties"])
    for group, options in groups().items():
        option = {"type": "string", "enum": options, "description": f"{group}=OPTION"}
        section = [properties[group]] if group in properties else []
        properties[group] = {"anyOf": [*section, option]}
    dotted = {key.path: key for key in keys_of_schema().values() if "." in key.path}
    properties |= {path: _flat(key) for path, key in dotted.items() if ANY_NAME not in path}
    return {
        "$schema": _DIALECT,
        "title": "cft",
        "description": "Options and keys of `cft train --config FILE.yaml`.",
        "type": "object",
        "properties": properties | {"defaults": _defaults()},
        "patternProperties": {
            _pattern(path): _flat(key) for path, key in dotted.items() if ANY_NAME in path
        },
        "additionalProperties": False,
        "$defs": definitions,
    }


def _open(section: dict[str, Any]) -> dict[str, Any]:
    """A section of which a part may be given; only the kind of a scorer decides what else fits."""
    required = [name for name in section.get("required", []) if name == "kind"]
    kept = {name: value for name, value in section.items() if name != "required"}
    return kept | ({"required": required} if required else {})


def _flat(key: Key) -> dict[str, Any]:
    """A key by its dotted path; what it may be is said in words, cft itself checks it."""
    return {"description": f"{key.doc} ({key.allowed})" if key.doc else key.allowed}


def _pattern(path: str) -> str:
    return "^" + re.escape(path).replace(re.escape(ANY_NAME), _NAME) + "$"


def _defaults() -> dict[str, Any]:
    """The list of options, as in Hydra's files."""
    one = {group: {"enum": options} for group, options in groups().items()}
    item = {"type": "object", "properties": one, "maxProperties": 1, "additionalProperties": False}
    return {
        "type": "array",
        "items": {"anyOf": [item, {"const": "_self_"}]},
        "description": f"Options of groups, such as `- {EXPERIMENT}: smoke`.",
    }
