"""What a long stage tells whoever watches it; the CLI draws it, the API is silent."""

from __future__ import annotations


class Progress:
    """Receives the pipeline's progress; this base class ignores it."""

    def stage(self, name: str) -> None:
        """A stage begins, and the former one is done."""

    def step(self, done: float, total: float | None, detail: str = "") -> None:
        """The stage is at ``done`` of ``total`` (None: unknown)."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


SILENT = Progress()
