import os
import sys
from pathlib import Path

import hierbayes

sys.path.insert(0, str(Path(__file__).parent / "ext"))
os.environ.pop("MPLBACKEND", None)  # with one that is set, pages would have no pictures

project = "hierbayes"
author = "The hierbayes developers"
copyright = "the hierbayes developers"
version = release = hierbayes.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax comes with the pages: they read without a network
    "sphinx_copybutton",
    "myst_nb",
    "coverage_check",  # docs/ext: a public name that no page documents fails the build
]
exclude_patterns = ["_build", "ext", "api/generated", "jupyter_execute"]
nitpicky = False

# pages that hold code cells are run at every build, and an error in a cell fails it
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js = {}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name types and shapes
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = f"hierbayes {version}"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
