"""Tools for looking inside: breakpoints by name, anomalies, tables of what ran, and graphs."""

from tinyllm.debug.anomaly import AnomalyError, detect_anomaly
from tinyllm.debug.breakpoints import break_on
from tinyllm.debug.graphs.drawing import Graph, graph
from tinyllm.debug.looking import explain, shapes
from tinyllm.debug.tracing import Row, Trace, summary, trace

__all__ = [
    "AnomalyError",
    "Graph",
    "Row",
    "Trace",
    "break_on",
    "detect_anomaly",
    "explain",
    "graph",
    "shapes",
    "summary",
    "trace",
]
