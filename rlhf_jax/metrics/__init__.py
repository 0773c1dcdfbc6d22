"""Metrics writers, progress, warnings and the run report. The report's libraries load where they are used."""

from rlhf_jax.metrics.health import Monitor, Thresholds
from rlhf_jax.metrics.progress import Progress, final_table, format_number, format_seconds
from rlhf_jax.metrics.report import TableRow, write_report
from rlhf_jax.metrics.writers import METRICS_FILE, MetricsWriter, read_metrics

__all__ = [
    "METRICS_FILE",
    "MetricsWriter",
    "Monitor",
    "Progress",
    "TableRow",
    "Thresholds",
    "final_table",
    "format_number",
    "format_seconds",
    "read_metrics",
    "write_report",
]
