"""One look for every report: a single HTML file that works without a network."""

from splitveil.report.page import write_report

__all__ = ["write_report"]
