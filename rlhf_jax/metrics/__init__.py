"""Metrics: loggers, progress, health checks and the run report. Their libraries load where they are used."""

from rlhf_jax.metrics.comparison import write_comparison
from rlhf_jax.metrics.health import HealthMonitor, Thresholds
from rlhf_jax.metrics.loggers import LOGGER_NAMES, Logger, as_logger, make_loggers
from rlhf_jax.metrics.progress import Progress, final_table, format_number, format_seconds
from rlhf_jax.metrics.report import TableRow, write_report
from rlhf_jax.metrics.tensorboard import TensorBoardLogger
from rlhf_jax.metrics.writers import METRICS_FILE, JSONLLogger, read_metrics

__all__ = [
    "LOGGER_NAMES",
    "METRICS_FILE",
    "HealthMonitor",
    "JSONLLogger",
    "Logger",
    "Progress",
    "TableRow",
    "TensorBoardLogger",
    "Thresholds",
    "as_logger",
    "final_table",
    "format_number",
    "format_seconds",
    "make_loggers",
    "read_metrics",
    "write_comparison",
    "write_report",
]
