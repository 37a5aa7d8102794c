"""Every key of the schema by its dotted path: what it may be, and what it means."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from constrained_ft.config import Config

ANY_NAME = "<name>"
"""Stands for a name of the user's in a path."""

Tree = dict[str, Any]

_PARTS = "of"  # of a scorer made of scorers


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
def keys_of_schema() -> dict[str, Key]:
    """Every key and section of the configuration by its dotted path, in the schema's order."""
    return {key.path: key for key in _walk([_schema()], "")}


def find_key(path: str) -> Key | None:
    """The key of a dotted path; `<name>` in the schema matches any name."""
    keys = keys_of_schema()
    path = re.sub(rf"(\.{_PARTS}\.[^.]+)+(?=\.)", "", path)
    if path in keys:
        return keys[path]
    parts = path.split(".")
    for key in keys.values():
        expected = key.path.split(".")
        if ANY_NAME in expected and len(expected) == len(parts):
            pairs = zip(expected, parts, strict=True)
            if all(e in (ANY_NAME, p) for e, p in pairs):
                return key
    return None


def dotted_path(loc: tuple[int | str, ...]) -> str:
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
        nodes = children.get(str(part), children.get(ANY_NAME, []))
    return ".".join(path)


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
        named = [option.get("additionalProperties"), *option.get("patternProperties", {}).values()]
        for child in named:
            if isinstance(child, dict):
                found.setdefault(ANY_NAME, []).append(child)
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


def _walk(nodes: Sequence[Tree], path: str, above: str = "") -> Iterator[Key]:
    """The keys below some nodes; a section that holds itself is not walked again."""
    merged: dict[str, list[Tree]] = {}
    # The parts of a scorer are scorers again: their keys stand one level higher already.
    for node in [] if path.endswith(f".{_PARTS}.{ANY_NAME}") else nodes:
        for name, children in _children(node).items():
            merged.setdefault(name, []).extend(children)
    doc = above
    if path:
        docs = [_resolved(node).get("description", "") for node in nodes]
        doc = " · ".join(dict.fromkeys(" ".join(d.split()) for d in docs if d))
        doc = doc or (above if path.endswith(ANY_NAME) else "")
        yield Key(path, _allowed(nodes), doc, any(_children(node) for node in nodes))
    for name, children in merged.items():
        yield from _walk(children, f"{path}.{name}" if path else name, doc)
