"""Runs a .mlpackage: with Core ML itself on macOS, interpreted elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowexport.core.errors import InputError
from flowexport.core.types import Artifact, Precision, RuntimeInfo, Session
from flowexport.targets.coreml.ends import AppEnds
from flowexport.targets.coreml.options import COMPUTE_UNITS
from flowexport.targets.coreml.package import read_spec
from flowexport.targets.coreml.sdk import quiet

INTERPRETED = "Core ML runs on macOS only; here its packages are interpreted"


def on_macos() -> bool:
    """Whether this machine has Core ML."""
    return platform.system() == "Darwin"


class CoreMLSession(Session):
    """``MLModel.predict`` on the compute units of the artifact's options."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact)
        import coremltools as ct

        read_spec(artifact.path)
        units = str(artifact.options.get("compute_units", "all"))
        try:
            self._model: Any = ct.models.MLModel(
                str(artifact.path),
                compute_units=ct.ComputeUnit[COMPUTE_UNITS[units]],
                function_name=artifact.entry if artifact.functions else None,
            )
        except Exception as error:  # Core ML's compiler raises RuntimeError and NSError wrappers
            line = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"load coreml {artifact.model}: Core ML refuses the package: {line}"
            ) from error
        self._ends = AppEnds(artifact, native=True)
        self._state: Any = self._model.make_state() if _state_inside(artifact) else None
        self._info = RuntimeInfo(
            name="Core ML",
            version=f"macOS {platform.mac_ver()[0]}",
            threads=threads,
            details={"compute_units": units, "threads": "chosen by Core ML"},
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        given = self._ends.feeds(feeds)
        if self._state is None:
            return self._ends.results(self._model.predict(given))
        return self._ends.results(self._model.predict(given, state=self._state))

    def reset_states(self) -> None:
        """Start a new stream where the package keeps the state."""
        if self._state is not None:
            self._state = self._model.make_state()

    def close(self) -> None:
        self._model = None


def _state_inside(artifact: Artifact) -> bool:
    """Whether this function keeps its state itself, in float16."""
    return bool(artifact.details.get("stateful", {}).get("function") == artifact.entry)


def open_session(artifact: Artifact, threads: int) -> Session:
    """Return the session that this machine has for Core ML packages.

    On macOS that is Core ML. Elsewhere it is the reference interpreter of the
    saved package, in its declared storage precision: its results are labelled
    interpreted and are no evidence of a device's arithmetic or speed.

    Raises:
        InputError: the package is corrupt.
    """
    quiet()
    if on_macos():
        return CoreMLSession(artifact, threads)
    from flowexport.targets.coreml.interpreter import InterpreterSession, Mode

    # Compressed weights are widened to half.
    half = artifact.precision is not Precision.FP32 or _state_inside(artifact)
    function = artifact.entry if artifact.functions else None
    return InterpreterSession(artifact, Mode.FP16 if half else Mode.EXACT, function)
