"""How ``make docs`` builds the site: pages in Markdown as they are, a theme without anything from the network."""

from __future__ import annotations

project = "opustomo"
author = "The opustomo developers"
extensions = ["myst_parser"]
exclude_patterns = ["images"]

html_theme = "furo"
html_title = "opustomo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 4  # headings are reached by the names that GitHub gives them
smartquotes = False  # an option is spelt with two hyphens
highlight_language = "none"  # command lines, formulas and what the program prints
