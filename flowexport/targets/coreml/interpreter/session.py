"""The session of the ``coreml`` target wherever macOS is absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version

import numpy as np

from flowexport.core.types import Artifact, RuntimeInfo, Session
from flowexport.targets.coreml import package
from flowexport.targets.coreml.ends import AppEnds
from flowexport.targets.coreml.interpreter.arithmetic import Mode
from flowexport.targets.coreml.interpreter.machine import Interpreter, OpValue, Progress
from flowexport.targets.coreml.interpreter.stats import OperatorStat, operator_stats


class InterpreterSession(Session):
    """Executes a saved .mlpackage on Linux by the reference interpreter.

    Its numbers are those of the stored program, not of a device: neither the
    accumulators nor the flushing of a particular chip are known here.

    Args:
        artifact: of the ``coreml`` target; its ``path`` is the .mlpackage.
        mode: ``exact``, ``fp16``, ``ftz`` or ``acc16``, see :class:`Mode`.
        function: of a multifunction package; None takes the default one.
        progress: called after every operator of every run.
        module_paths: PyTorch module path of results by name, for messages; None takes
            those that the package tells.
    """

    def __init__(
        self,
        artifact: Artifact,
        mode: Mode | str = Mode.EXACT,
        function: str | None = None,
        *,
        progress: Progress | None = None,
        module_paths: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(artifact)
        if module_paths is None:
            told = function or artifact.entry
            module_paths = package.module_paths(package.read_spec(artifact.path), told)
        self.interpreter = Interpreter(
            artifact.path,
            mode=mode,
            function=function,
            module_paths=module_paths,
            model=artifact.model,
        )
        self._progress = progress
        self._ends = AppEnds(artifact, native=False)
        self._states = self.interpreter.new_states()

    @property
    def info(self) -> RuntimeInfo:
        import torch

        return RuntimeInfo(
            name="coreml-interpreter",
            version=version("flowexport"),
            threads=torch.get_num_threads(),
            execution="interpreted",
            details={
                "mode": self.interpreter.mode.value,
                "function": self.interpreter.function_name,
                "coremltools": version("coremltools"),
                "torch": version("torch"),
                "note": "interpreted, not run on a device",
            },
        )

    def reset_states(self) -> None:
        """Set every state to zeros, as a new ``MLState`` on a device."""
        self._states = self.interpreter.new_states()

    def values(self, feeds: Mapping[str, np.ndarray]) -> Iterator[OpValue]:
        """Run once and yield every operator's results, in execution order."""
        return self.interpreter.run_with_values(self._ends.feeds(feeds))

    def operator_stats(self, feeds: Mapping[str, np.ndarray]) -> list[OperatorStat]:
        """Run once and describe every float result: peak, subnormals, rank."""
        return operator_stats(self.values(feeds))

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        given = self._ends.feeds(feeds)
        return self._ends.results(
            self.interpreter.run(given, states=self._states, progress=self._progress)
        )
