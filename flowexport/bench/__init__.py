"""Latency: interleaved measurement, the conditions it was taken under, and statistics."""

from flowexport.bench.machine import machine_facts
from flowexport.bench.measure import bench_feeds, measure
from flowexport.bench.statistics import Ratio, ratio_of_medians, ratio_of_unpaired_medians
from flowexport.bench.steps import measure_steps

__all__ = [
    "Ratio",
    "bench_feeds",
    "machine_facts",
    "measure",
    "measure_steps",
    "ratio_of_medians",
    "ratio_of_unpaired_medians",
]
