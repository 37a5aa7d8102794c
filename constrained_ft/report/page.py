"""The two forms of a report: a page of HTML, and Markdown.

The page holds its style, script and figures itself and asks for nothing. Its content security
policy allows its one script only, so that no text in it could run even if it were not escaped.
"""

import hashlib
from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from constrained_ft.report.content import Content
from constrained_ft.report.text import markdown, visible


def render(content: Content) -> tuple[str, str]:
    """The page and the Markdown."""
    loader = PackageLoader("constrained_ft.report")
    html = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html.filters["visible"] = visible
    source = html.loader
    assert source is not None
    script = source.get_source(html, "script.js")[0]
    style = source.get_source(html, "style.css")[0]
    page = html.get_template("page.html").render(
        content=content,
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        markup=Markup,
    )
    plain = Environment(
        loader=loader,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain.filters["visible"] = visible
    text = plain.get_template("report.md").render(content=content, markup=Markup)
    return page, text


def _plain(value: Any) -> str:
    return markdown(value)
