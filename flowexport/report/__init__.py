"""A bundle's report: JSON Schemas, report.json, report.html and the terminal's table."""

from flowexport.report.document import build_report, read_report, write_report
from flowexport.report.html import render_html
from flowexport.report.schema import SCHEMAS, validate
from flowexport.report.terminal import summary_table

__all__ = [
    "SCHEMAS",
    "build_report",
    "read_report",
    "render_html",
    "summary_table",
    "validate",
    "write_report",
]
