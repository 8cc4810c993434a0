"""An ONNX file on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexport.core.errors import BundleError, VerificationError
from flowexport.core.types import Artifact, RuntimeInfo, Session

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = ("CPUExecutionProvider",)


class OnnxSession(Session):
    """ONNX Runtime with every graph optimisation and without spinning threads.

    Args:
        artifact: of the ``onnx`` target.
        threads: size of the intra-op pool; operators run one after the other.

    Raises:
        BundleError: the file is missing or ONNX Runtime cannot load it.
    """

    def __init__(self, artifact: Artifact, threads: int = 1) -> None:
        super().__init__(artifact)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
        try:
            session = ort.InferenceSession(
                str(artifact.path), sess_options=options, providers=list(PROVIDERS)
            )
        except Exception as error:
            raise BundleError(
                f"load onnx {artifact.model}: ONNX Runtime refuses {artifact.path.name}:"
                f" {_first_line(error)}",
                fix="convert again",
            ) from error
        self._session: onnxruntime.InferenceSession | None = session
        self._names = [spec.name for spec in artifact.outputs]
        self._info = RuntimeInfo(
            name="onnxruntime",
            version=ort.__version__,
            threads=threads,
            details={
                "providers": session.get_providers(),
                "graph_optimization": options.graph_optimization_level.name,
            },
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        where = f"run onnx {self.artifact.model}"
        if self._session is None:
            raise VerificationError(f"{where}: the session is closed.")
        try:
            results: list[Any] = self._session.run(self._names, dict(feeds))
        except Exception as error:
            raise VerificationError(
                f"{where}: ONNX Runtime failed: {_first_line(error)}"
            ) from error
        return dict(zip(self._names, results, strict=True))

    def close(self) -> None:
        self._session = None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
