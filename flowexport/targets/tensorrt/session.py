"""An engine on a GPU, its buffers held by torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flowexport.core.errors import BundleError, InputError, UnavailableError, VerificationError
from flowexport.core.types import Artifact, RuntimeInfo, Session
from flowexport.targets.tensorrt.sdk import SDK


class TensorRTSession(Session):
    """Deserialises an engine and runs it on torch's current CUDA stream.

    Raises:
        UnavailableError: torch sees no GPU.
        BundleError: the engine is broken, or of another GPU or library version.
    """

    def __init__(self, artifact: Artifact, sdk: SDK) -> None:
        super().__init__(artifact)
        import torch

        where = f"load tensorrt {artifact.model}"
        if not torch.cuda.is_available():
            raise UnavailableError(
                f"{where}: this torch ({torch.__version__}) sees no GPU.",
                fix="pip install torch with CUDA (https://pytorch.org/get-started)",
            )
        trt = sdk.load()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if self._engine is None:
            name = torch.cuda.get_device_name()
            raise BundleError(
                f"{where}: {sdk.label} {trt.__version__} on {name} refuses {artifact.path.name}.",
                fix="convert on this machine, or name its compute capability",
            )
        self._context = self._engine.create_execution_context()
        self._info = RuntimeInfo(
            name=sdk.label,
            version=trt.__version__,
            threads=1,
            details={"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        import torch

        where = f"run tensorrt {self.artifact.model}"
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        buffers = {}
        with torch.cuda.stream(stream):
            for name, value in feeds.items():
                buffers[name] = torch.from_numpy(np.ascontiguousarray(value)).cuda()
                if not self._context.set_input_shape(name, value.shape):
                    raise InputError(
                        f"{where}: {name} has shape {value.shape};"
                        " expected one that the optimization profile covers.",
                        fix="set the option 'profile' and convert again",
                    )
            for spec in self.artifact.outputs:
                shape = tuple(self._context.get_tensor_shape(spec.name))
                buffers[spec.name] = torch.empty(
                    shape, dtype=getattr(torch, spec.dtype), device="cuda"
                )
            for name, buffer in buffers.items():
                self._context.set_tensor_address(name, buffer.data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise VerificationError(f"{where}: the engine failed; expected it to run.")
        stream.synchronize()
        return {spec.name: buffers[spec.name].cpu().numpy() for spec in self.artifact.outputs}

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
