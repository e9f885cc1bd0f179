"""Configuration of the documentation: snippets on pages are doctests, tutorials are notebooks."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

from diffusionkit import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "diffusionkit"
author = "The diffusionkit developers"
copyright = author
release = __version__

extensions = [
    "code_links",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_codeautolink",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "tables"]

# Notebooks are pages whose header names a kernel; an error in a cell is an error of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 180
nb_execution_in_temp = True
nb_merge_streams = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "diffusionkit"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"

codeautolink_concat_default = True  # snippets of a page continue one another
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output are not copied
viewcode_line_numbers = True

add_module_names = False
default_role = "py:obj"
autoclass_content = "class"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Snippets import what they use: only their random numbers and their folder are set up, under names
# that no snippet has.
doctest_global_setup = """
import os as _os, tempfile as _tempfile, torch as _torch

_torch.manual_seed(0)
_torch.set_num_threads(1)  # the tensors are tiny
_start, _folder = _os.getcwd(), _tempfile.TemporaryDirectory()
_os.chdir(_folder.name)
"""
doctest_global_cleanup = """
_os.chdir(_start)
_folder.cleanup()
"""


def as_restructured_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep what docstrings say from being read as markup: (B, *D), **cond and `.step()`."""
    for n, line in enumerate(lines):
        line = re.sub(r"(?<![\\*])\*(?=D\b)", r"\\*", line)
        line = re.sub(r"(?<![\\*])\*\*(?=cond\b)", r"\\*\\*", line)
        lines[n] = re.sub(r"(?<!`)`(\.[^`]+)`(?!`)", r"``\1``", line)


def setup(app: Sphinx) -> None:
    """Connect what this file adds."""
    app.connect("autodoc-process-docstring", as_restructured_text)
