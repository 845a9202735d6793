"""The site: Sphinx, from docs/*.md and the docstrings. `make docs` builds it, strictly."""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Any

from latex2mathml.converter import convert

project = "lora_fx"
author = "the authors of lora_fx"
copyright = "the authors of lora_fx"
release = version = version_of("lora-fx")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"lora_fx {release}"
html_static_path = ["pictures", "style.css"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
# A name that nobody documents is an error; those of other libraries are documented elsewhere.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|fx|nn|np|numpy|ort|ir|collections|pathlib|typing)\..*"),
]


def _visit(self: Any, node: Any) -> None:
    """Writes a formula as MathML, which browsers show without a script or a network."""
    display = "block" if type(node).__name__ == "math_block" else "inline"
    self.body.append(convert(node.astext(), display=display))
    from docutils import nodes

    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Tells Sphinx of the renderer."""
    app.add_html_math_renderer("mathml", (_visit, None), (_visit, None))
