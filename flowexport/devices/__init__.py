"""Device reports: read, judged anew from their raw data, compared."""

from flowexport.devices.merge import MergeResult, merge_reports
from flowexport.devices.reading import SCHEMA, read_device_report

__all__ = ["SCHEMA", "MergeResult", "merge_reports", "read_device_report"]
