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
    definitions, properties = _open(tree["$defs"]), _open(tree["properties"])
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


def _open(node: Any) -> Any:
    """A schema of which a part may be given, also of a scorer whose kind an option chooses."""
    if isinstance(node, list):
        return [_open(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _open(one) for name, one in node.items() if name != "discriminator"}
    if isinstance(kept.get("required"), list):
        del kept["required"]
    # Without their kind, the keys of a scorer may fit several.
    return {"anyOf" if name == "oneOf" else name: one for name, one in kept.items()}


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
