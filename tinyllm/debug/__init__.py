"""Tools for looking inside: breakpoints by name, anomalies, tables of what ran."""

from tinyllm.debug.anomaly import AnomalyError, detect_anomaly
from tinyllm.debug.breakpoints import break_on
from tinyllm.debug.trace import Row, Trace, summary, trace

__all__ = ["AnomalyError", "Row", "Trace", "break_on", "detect_anomaly", "summary", "trace"]
