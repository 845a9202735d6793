"""The site: Sphinx, from docs/*.md and the docstrings. `make docs` builds it, strictly."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[1]

project = "lora_fx"
author = "the authors of lora_fx"
copyright = "the authors of lora_fx"
release = version = version_of("lora-fx")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
smartquotes = False  # a W' stays one
myst_heading_anchors = 3
myst_fence_as_directive = {"math"}  # which other viewers of Markdown show as a formula too
html_theme = "furo"
html_title = f"lora_fx {release}"
html_static_path = ["pictures", "style.css"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_type_aliases = {"AnyUpdate": "AnyUpdate"}
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
default_role = "py:obj"  # `inject` in a docstring is what is called so
# A reference to what is documented nowhere is an error, unless it is of another library, or a type
# that users are handed and do not make.
nitpicky = True
_LIBRARIES = "collections|dataclasses|fx|ir|nn|np|numpy|onnxruntime|ort|os|pathlib|torch|typing"
_ROOMS = "algebra|branch_lowering|graph|injection|layers|reference"
nitpick_ignore_regex = [
    ("py:.*", rf"({_LIBRARIES})\..*"),
    ("py:.*", rf"lora_fx\.({_ROOMS})\..*"),
    ("py:.*", r"lora_fx\.(adapters\.(source_record|updates)|tasks\.calls|testing\.updates)\..*"),
    ("py:class", r"AnyUpdate|TargetRule|lora_fx\.export\.report\.(Clock|Verification)"),
    # Of a signature that names what is imported for its types alone, and so stays as it is written.
    ("py:class", r"Path|dict\[str"),
]


def _escape(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Keeps ``(out, in, *kernel)`` in a docstring from beginning an emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=\w)", r"\\*", line) for line in lines]


@cache
def _defined() -> set[str]:
    """Every name that the source defines, and every module of it."""
    files = [
        file for room in ("lora_fx", "passes", "export") for file in (ROOT / room).rglob("*.py")
    ]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    named = (ast.FunctionDef, ast.ClassDef)
    assigned = {node.id for node in nodes if isinstance(node, ast.Name)}
    return (
        assigned
        | {node.name for node in nodes if isinstance(node, named)}
        | {part for file in files for part in file.relative_to(ROOT).with_suffix("").parts}
    )


def _short(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """Finds `fold` for lora_fx.fold; shows what only the source has; misses what nobody has."""
    target = node["reftarget"]
    if node["reftype"] != "obj":
        return None
    objects = env.get_domain("py").objects
    found = [name for name in objects if name.endswith(f".{target}")]
    if found:
        name = min(found, key=len)
        page, place = objects[name].docname, objects[name].node_id
        return make_refnode(app.builder, node["refdoc"], page, place, shown, name)
    return shown if set(target.split(".")) <= _defined() else None


def _visit(self: Any, node: Any) -> None:
    """Writes a formula as MathML, which browsers show without a script or a network."""
    display = "block" if type(node).__name__ == "math_block" else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise SkipNode


def setup(app: Any) -> None:
    """Tells Sphinx of these."""
    app.connect("missing-reference", _short)
    app.connect("autodoc-process-docstring", _escape, priority=999)
    app.add_html_math_renderer("mathml", (_visit, None), (_visit, None))
