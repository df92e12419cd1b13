"""Sphinx's settings for the book. docs/build.py prepares the pages in build/pages and calls Sphinx."""

from mvrepro import __version__

project = "mvrepro"
author = "the mvrepro maintainers"
release = __version__
html_title = "mvrepro: a replication of MV-Softmax"

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables and mathematics in what the notebooks print, too
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_heading_anchors = 3  # so that a link can lead to a heading
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]

html_theme = "furo"
html_static_path = ["../build/static"]
html_favicon = "static/icon.svg"
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = False  # each page links its notebook as it lies in the repository
html_show_sphinx = False
html_show_copyright = False
html_use_index = False
mathjax_path = "mathjax/tex-chtml.js"
# Without its menu MathJax never loads more than what lies beside it.
mathjax3_config = {"options": {"enableMenu": False}}
