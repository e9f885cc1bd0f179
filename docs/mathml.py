"""A sphinx extension: formulas as MathML, which browsers draw without scripts or a network."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

OPERATORS = r"<mi>(?:log|ln|exp|sinh|tanh|sin|cos)</mi>"
THIN = '<mspace width="0.17em" />'


def mathml(latex: str, display: str = "inline") -> str:
    """Convert a formula, with the spaces around operators that the converter leaves out."""
    if r"\\" in latex or "&" in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    code = convert(latex, display=display).replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    code = re.sub(rf"(?<=</mi>|</mn>)({OPERATORS})", rf"{THIN}\1", code)
    return re.sub(rf"({OPERATORS})(?!<mo[^>]*>&#x00028;)", rf"\1{THIN}", code)


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on its own line."""
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer, `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
