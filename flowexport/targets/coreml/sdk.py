"""Keeps what coremltools says on import off the user's terminal."""

from __future__ import annotations

import logging


def quiet() -> None:
    """Silence warnings that no user can act on; call before coremltools is first imported.

    They are about untested versions of torch and scikit-learn, about the
    libraries that exist on macOS only, and about torchao's CUDA parts.
    """
    for name in ("coremltools", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
