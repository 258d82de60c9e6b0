"""Charts as SVG: lines over panels, rows with intervals, and maps of layers."""

from next_core.drawing.chart import Chart, Charts, drawn_or_error
from next_core.drawing.lines import Lane, Line, Lines, Panel
from next_core.drawing.maps import Maps
from next_core.drawing.rows import Dot, Rows
from next_core.drawing.scale import Axis, Scale

__all__ = [
    "Axis",
    "Chart",
    "Charts",
    "Dot",
    "Lane",
    "Line",
    "Lines",
    "Maps",
    "Panel",
    "Rows",
    "Scale",
    "drawn_or_error",
]
