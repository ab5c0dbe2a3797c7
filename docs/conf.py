"""How Sphinx builds the pages: ``make docs``."""

import importlib.util
import re
import shutil
from pathlib import Path

import madax

project = "madax"
release = version = madax.__version__
copyright = "the authors of madax, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]

# Sphinx reads what is in this folder only, so it gets copies of the notebooks.
HERE = Path(__file__).parent
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
(HERE / "notebooks").mkdir()
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(notebook, HERE / "notebooks")

# Pages are Markdown. Notebooks hold their outputs, so none is run.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_markdown_format = "myst"

# The API pages are made of docstrings, in the order of the page.
add_module_names = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_type_aliases = {
    "jax.typing.ArrayLike": "ArrayLike",
    "optax.ScalarOrSchedule": "ScalarOrSchedule",
}
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 60
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "madax"
html_static_path = ["_static"]
html_css_files = ["madax.css"]
html_copy_source = False
html_show_sourcelink = False

# Formulas are drawn by a script that comes with the pages, so that they need no other
# host. The package keeps it in a folder of this name.
mathjax_path = "tex-svg.js"
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
html_static_path.append(
    str(Path(_mathjax.origin).parent / "static" / "mathjax" / mathjax_path)
)


def setup(app):
    """Signatures have the names of type aliases, in unions, too."""

    def named(app, what, name, obj, options, signature, returns):
        if not signature:
            return None
        return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature), returns

    app.connect("autodoc-process-signature", named)
