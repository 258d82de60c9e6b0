"""Pages generated from the code at each build, so that they cannot drift from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import next_core
from docs.extensions import api_reference, cli_reference, config_reference

RELATED = {
    "next_core.plugins": ["Registry", "Entry"],
    "next_core.mathematics.lora_trajectory": ["LoraTrajectory"],
    "next_core.history.executor": ["Executor"],
    "next_core.history.delta_cache": ["DeltaCache"],
    "next_core.run_config": ["Schedule", "Guards"],
    "next_core.cycle.journal": ["Journal"],
}
"""Classes that the public names take and return."""
PREDICTORS = ["TrajectoryPredictor", "PerMatrixPredictor", "CoefficientConfig"]
INTERFACES = ["types", "settings", "interfaces", "backend"]
DIAGNOSTICS = ["analyze", "Analysis", "Group", "Figure", "Null", "Series", "with_origin", "learning_rate_factor"]
DIAGNOSTICS += ["LearningRate", "Precision"]
TASKS = {
    "read": ["open_run", "open_checkpoints", "RecordedRun", "History", "MatrixHistory"],
    "measure": ["analyze", "backtest"],
    "extrapolate": [
        "extrapolate",
        "make_predictor",
        "make_applier",
        "make_compressor",
        "Prediction",
        "LowRank",
        "LowRankUpdate",
        "Factors",
        "generate_extrapolated",
    ],
    "extend": [
        "matrix_predictor",
        "PerMatrixPredictor",
        "TrajectoryPredictor",
        "CoefficientUpdate",
        "Abstain",
        "StepPredictor",
        "StepConfig",
        "StepHistory",
        "StepScale",
        "Settings",
        "registry",
        "load_config",
    ],
}
"""Public names by what they are for; the others are predictors."""
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>\.\.?/[^)#:\s]+)(#[^)\s]*)?\)")
PARTS: dict[str, Callable[[], str]] = {
    "run-config": config_reference.run_config,
    "comparison-config": config_reference.comparison_config,
    "plugin-configs": config_reference.plugins,
    "commands": cli_reference.commands,
    "exit-codes": cli_reference.exit_codes,
    **{f"api-{task}": lambda names=names: api_reference.module("next_core", names) for task, names in TASKS.items()},
    "api-predictors": lambda: api_reference.module("next_core", _rest()),
    "api-errors": lambda: api_reference.module("next_core.errors"),
    "api-interfaces": lambda: "\n\n".join(api_reference.module(f"next_core.{name}") for name in INTERFACES),
    "api-per-matrix": lambda: api_reference.module("next_core.predictor", PREDICTORS),
    "api-parts": lambda: "\n\n".join(api_reference.module(name, only) for name, only in RELATED.items()),
    "api-diagnostics": lambda: api_reference.module("next_core.diagnostics", DIAGNOSTICS),
    "api-testing": lambda: api_reference.module("next_core.testing"),
    "api-trl": lambda: api_reference.module("next_backends.trl"),
}


def _rest() -> list[str]:
    grouped = {name for names in TASKS.values() for name in names}
    return [name for name in next_core.__all__ if name not in grouped]


def write(app: Sphinx) -> None:
    """Write each part into docs/_build/generated, from where the pages include it."""
    folder = Path(app.srcdir) / "_build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    api_reference.SHOWN.clear()
    for name, make in PARTS.items():
        (folder / f"{name}.md").write_text(make() + "\n")


def name_files_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace a link to a file of the repository that is no page by the name of the file."""
    page = Path(app.srcdir, f"{docname}.md")

    def named(link: re.Match[str]) -> str:
        file = (page.parent / link["path"]).resolve()
        if file.is_relative_to(app.srcdir) or not file.is_relative_to(Path(app.srcdir).parent):
            return link[0]
        return f"{link['text']} (`{file.relative_to(Path(app.srcdir).parent).as_posix()}`)"

    source[0] = LINK.sub(named, source[0])


def escape_docstring(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Escape accidental markup in a docstring of autodoc."""
    api_reference.plain(lines)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> Any:
    """Link a type that a signature names without its module to the documented object of that name."""
    objects = env.domains.python_domain.objects
    short = str(node.get("reftarget", "")).rpartition(".")[2]
    found = {name for name, entry in objects.items() if name.rpartition(".")[2] == short and not entry.aliased}
    if node.get("refdomain") != "py" or not found:
        return None
    name = min(found, key=len)
    entry = objects[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx's events."""
    app.connect("builder-inited", write)
    app.connect("source-read", name_files_outside)
    app.connect("autodoc-process-docstring", escape_docstring)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
