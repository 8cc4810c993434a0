"""Errors that bad input can cause: one class a stage, each with the CLI's exit code.

A message reads ``<stage> <target> <model>: <tensor or node> has <actual>;
expected <constraint>.`` and carries the command or option that mends it. A
traceback is for bugs, never for bad input.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_CONVERSION = 3
EXIT_VERIFICATION = 4
EXIT_UNAVAILABLE = 5
EXIT_INTERRUPTED = 130


class FlowExportError(Exception):
    """Base of every error that a user can mend.

    Args:
        message: what is wrong: the thing, its actual value and the constraint.
        fix: the command or option that mends it, or None.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(message if fix is None else f"{message} Fix: {fix}")


class UnknownNameError(FlowExportError):
    """A name that no registry, schema or list knows; the message lists the valid ones."""

    def __init__(
        self, kind: str, name: str, valid: Iterable[str], *, where: str | None = None
    ) -> None:
        choices = sorted(valid)
        near = get_close_matches(name, choices, n=1)
        place = f"{where}: " if where else ""
        listed = ", ".join(choices) if choices else "none"
        super().__init__(
            f"{place}unknown {kind} {name!r}; expected one of: {listed}.",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )


class RecipeError(FlowExportError):
    """A recipe that cannot be read or does not follow its schema."""


class CheckpointError(FlowExportError):
    """Weights that cannot be read, are unsafe, or belong to another model."""


class InputError(FlowExportError):
    """A shape, dtype, option or file given by the user that does not fit."""


class OutputError(FlowExportError):
    """An output folder that exists, is in use, is full or cannot be written."""


class BundleError(FlowExportError):
    """A path that is no bundle, or a bundle that is incomplete."""


class LoweringError(FlowExportError):
    """``torch.export`` or a lowering pass refused the model."""

    exit_code = EXIT_CONVERSION


class ConversionError(FlowExportError):
    """A converter refused the program, crashed, or produced an unusable file."""

    exit_code = EXIT_CONVERSION


class VerificationError(FlowExportError):
    """An artifact's numbers, accuracy or hash are not what they must be."""

    exit_code = EXIT_VERIFICATION


class UnavailableError(FlowExportError):
    """A requested target cannot be converted or run on this machine."""

    exit_code = EXIT_UNAVAILABLE
