"""Text that a model wrote, made fit to be shown: no character of it acts, none is hidden."""

import re
import unicodedata

from markupsafe import Markup

_LONGEST = 600
_MARKS = re.compile(r"([\\`*_{}\[\]()#+.!|~$:-])")


def visible(text: str, longest: int = _LONGEST) -> str:
    """Control and format characters as signs, line breaks as ↵, and what is very long cut."""
    more = len(text) - longest
    if more <= 0 and text.isprintable():
        return text
    shown = "".join(_sign(character) for character in text[:longest])
    return f"{shown}… ({more:,} more characters)" if more > 0 else shown


def _sign(character: str) -> str:
    if character in "\n\r":
        return "↵ "
    if character == "\t":
        return " "
    if unicodedata.category(character)[0] != "C":
        return character
    code = ord(character)
    # The control pictures of Unicode; what else moves, hides or stands for nothing is one sign.
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def markdown(value: object) -> str:
    """Text in Markdown, in which no mark means anything; `Markup` is left as it is."""
    if isinstance(value, Markup):
        return str(value)
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\1", text).replace("\n", " ")
