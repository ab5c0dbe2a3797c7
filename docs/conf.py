"""How Sphinx builds the pages: ``make docs``."""

import importlib.util
import re
import shutil
import typing
from pathlib import Path

import jax
import optax
from sphinx.util.typing import stringify_annotation

import madax

project = "madax"
release = version = madax.__version__
copyright = "the authors of madax, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
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
autosummary_generate = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
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


# Aliases of types, which annotations hold written out. The longest come first.
ALIASES = {
    stringify_annotation(kind, "smart"): name
    for kind, name in {
        optax.ScalarOrSchedule: "ScalarOrSchedule",
        jax.typing.DTypeLike: "DTypeLike",
        jax.typing.ArrayLike: "ArrayLike",
        typing.Any: "Any",
    }.items()
}


def setup(app):
    """Signatures have the names of aliases, and API pages a table of what they hold."""

    def named(app, what, name, obj, options, signature, returns):
        for text, alias in ALIASES.items():
            signature = signature and signature.replace(text, alias)
            returns = returns and returns.replace(text, alias)
        return signature, returns

    def summarised(app, page, source):
        if page.startswith("api/"):
            names = re.findall(r"^\.\. auto\w+:: (\S+)", source[0], re.MULTILINE)
            lines = [".. autosummary::", ":nosignatures:", "", *names, ""]
            table = "\n   ".join(lines)
            source[0] = source[0].replace(".. autosummary::", table)

    def anywhere(app, env, node, content):
        """Docstrings name what is public in short, wherever it is."""
        for room in (
            "",
            ".optimizers",
            ".transforms",
            ".wrappers",
            ".papers",
            ".formats",
            ".hijax",
            ".trainers",
        ):
            node["py:module"] = f"madax{room}"
            target = node["reftype"], node["reftarget"], node, content
            found = node.get("refdomain") == "py" and env.domains["py"].resolve_xref(
                env, node["refdoc"], app.builder, *target
            )
            if found:
                return found
        return None

    app.connect("autodoc-process-signature", named)
    app.connect("missing-reference", anywhere)
    app.connect("source-read", summarised)
