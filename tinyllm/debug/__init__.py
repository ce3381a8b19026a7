"""Tools for looking inside: breakpoints by name, anomalies, tables of what ran, drawings, and a profiler.

All but `breakpoints`, which puts a stop into the op itself, are observers (`autograd.mode`): they are told of each op
before and after it runs, and find out from `origin` in which module and line. `tracing` makes tables of that, `anomaly`
an error at the first number that cannot be right, `profiler` means of time and memory; `graphs` draws what is left.
"""

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
