"""Sphinx: `make docs` builds the site into docs/_build/html; a warning is an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "next-core"
author = "The next-core authors"
project_copyright = author
release = version = installed("next-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "docs.extensions.reference", "docs.extensions.mathml"]
exclude_patterns = ["_build", "extensions"]
html_theme = "furo"
html_title = f"next-core {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto"]

INNER = (
    r"next_backends\.trl",
    r"next_predictors",
    r"next_core\.notebook",
    r"next_core\.diagnostics\.(backtest_results|drawing)",
    r"next_core\.drawing",
    r"next_core\.interfaces\.checkpoint_source",
    r"next_core\.run_config",
    r"next_core\.history\.executor\.Result",
    r"next_core\.mathematics\.lora_trajectory\.Workspace",
    r"next_core\.interfaces\.trainer_steps",
    r"next_core\.live_weights\.(optimizer_steps|processes)",
    r"next_core\.predictor\.(Config|Predictor|Work)",
    r"next_core\.step_predictor\.StepConfig",
    r"next_core\.sources",
)
"""Where bases and types of public names live that are no public names themselves."""
nitpicky = True
# Names of other projects, whose own sites describe them; ours have to resolve.
nitpick_ignore_regex = [(r"py:.*", r"(?!next_).*"), (r"py:.*", rf"({'|'.join(INNER)})\b.*")]
default_role = "code"
smartquotes = False  # --option is two hyphens
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
