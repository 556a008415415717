"""How Sphinx makes the site of these pages: see "The site" in CONTRIBUTING.md."""

import os.path
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

import optax_sam

project = "optax_sam"
author = copyright = "The optax_sam authors"
release = version = optax_sam.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = []
nitpicky = True
# Types and words in code that are no names of this library.
nitpick_ignore_regex = [
    ("py:(class|obj)", ".*"),
    ("py:.*", r"(flax|jax|nnx|optax)\..*"),
]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Docstrings say more: shapes, dtypes, units.
default_role = "py:obj"
python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "optax_sam"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # It is fetched, which a page in a file may not do.
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "default", "monokai"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

ROOT = Path(__file__).parent.parent
# Pages that consist of a file elsewhere in the repository.
INCLUDED = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "examples/benchmarks/README.md": "benchmarks.md",
    "examples/study/README.md": "study.md",
}


def place_links(text, file):
    """Lets the links of a file lead to where the site, from docs/, has their targets.

    In the repository links are relative paths, which GitHub follows. The site has the
    pages in docs/ and copies of other files, but neither folders nor other pages.
    """
    folder = os.path.dirname(file) if file.startswith("docs/") else "docs"

    def place(link):
        label, path, anchor = link.groups(default="")
        target = os.path.normpath(os.path.join(os.path.dirname(file), path))
        if f"{target}/README.md" in INCLUDED:
            target = f"{target}/README.md"
        if target in INCLUDED:
            target = f"docs/{INCLUDED[target]}"
        if not (ROOT / target).exists():
            return link[0]  # Sphinx warns of it.
        is_page = target.endswith(".md") and not target.startswith("docs/")
        if is_page or (ROOT / target).is_dir():
            return label
        return f"[{label}]({os.path.relpath(target, folder)}{anchor})"

    return re.sub(r"\[([^][]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)", place, text)


def navigation(text):
    """The pages that the lists of an index lead to, as tables of contents."""
    _, *sections = re.split(r"^## *(.*)\n", f"##\n{text}", flags=re.MULTILINE)
    for caption, section in zip(sections[::2], sections[1::2], strict=True):
        pages = re.findall(r"^- \[.*?\]\(([^)#]*)\.md\)", section, re.MULTILINE)
        if pages:
            options = [":hidden:", f":caption: {caption}" if caption else ""]
            lines = ["```{toctree}", *options, "", *pages, "```"]
            yield "\n".join(["", *lines, ""])


def read_source(app, docname, content):
    """Places the links of a page, and makes what an index lists its navigation."""
    file = os.path.relpath(app.env.doc2path(docname), ROOT)
    content[0] = place_links(content[0], file)
    if os.path.basename(docname) == "index":
        content[0] += "".join(navigation(content[0]))


def read_included(app, relative_path, parent_docname, content):
    """Places the links of a file that a page includes."""
    file = os.path.relpath(app.srcdir / relative_path, ROOT)
    content[0] = place_links(content[0], file)


def visit_math(self, node):
    """Writes a formula as MathML, which browsers render by themselves."""
    write_formula(self, node, node.astext(), "inline")


def visit_math_block(self, node):
    """Writes a formula that stands by itself, in lines if it has any."""
    latex = node.astext()
    if r"\\" in latex and r"\begin{" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    self.body.append('<div class="math">')
    try:
        write_formula(self, node, latex, "block")
    finally:
        self.body.append("</div>")


def write_formula(self, node, latex, display):
    """Writes MathML in place of a node and of what is in it."""
    formula = convert(latex, display=display)
    if "\\" in formula:
        warning = "latex2mathml does not know a command in %s"
        logging.getLogger(__name__).warning(warning, latex, location=node)
    self.body.append(formula)
    raise nodes.SkipNode


def setup(app):
    """Registers the above with Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("source-read", read_source)
    app.connect("include-read", read_included)
