"""Ours against a baseline: the published form, exported by the target's stock exporter."""

from flowexport.baseline.compare import BASELINES, compare_recipe
from flowexport.baseline.sessions import Comparison, compare_sessions

__all__ = ["BASELINES", "Comparison", "compare_recipe", "compare_sessions"]
