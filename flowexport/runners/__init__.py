"""Other machines and runtimes that a bundle is verified on, each set up in a cache folder."""

from flowexport.runners.machine import RUNNERS, Machine, Setup, prepare, probe
from flowexport.runners.session import EMULATED_SAMPLES, RunnerTarget

__all__ = ["EMULATED_SAMPLES", "RUNNERS", "Machine", "RunnerTarget", "Setup", "prepare", "probe"]
