"""A hook of mkdocs: formulas become MathML while the site is built, so that its pages load nothing."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace each formula that pymdownx.arithmatex marked."""

    def mathml(found: "re.Match[str]") -> str:
        return convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")

    return FORMULA.sub(mathml, content)
