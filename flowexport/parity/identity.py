"""What a finished file says of itself, held against what the bundle says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flowexport.core.stored import changed
from flowexport.core.types import Artifact

RECORDED = (
    "operators",
    "scalars",
    "layers",
    "layer_types",
    "profiles",
    "compute_capabilities",
    "weights",
    "ranges",
)
"""Facts of a finished file that a target writes into ``Artifact.details`` and ``inspect`` reads."""


@dataclass(frozen=True)
class Identity:
    """What the manifest vouches for.

    Attributes:
        labels: class names in output order, or empty.
        preprocessing: how samples become inputs.
        details: what the target recorded of the file when it was made.
        fusions: fused operator -> count in the file when it was made.
    """

    model: str
    precision: str
    recipe_sha256: str
    labels: Sequence[str] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    fusions: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, artifact: Artifact, manifest: Mapping[str, Any]) -> Identity:
        """Return what an artifact must say of itself, from the bundle's own description."""
        return cls(
            model=manifest["model"]["name"],
            precision=artifact.precision.value,
            recipe_sha256=manifest["recipe_sha256"],
            labels=tuple(manifest["labels"]),
            preprocessing=manifest["preprocessing"],
            details=artifact.details,
            fusions=artifact.fusions,
        )

    def beside(self, function: str) -> Identity:
        """Return what the file of another function must say, where it is one of its own."""
        details = self.details.get("beside", {}).get(function, {})
        return replace(self, details=details, fusions=details.get("fusions", {}))

    def mismatches(self, found: Mapping[str, Any]) -> tuple[str, ...]:
        """Return how a file's own description differs from this one.

        Args:
            found: what ``Target.inspect`` read. Its key ``metadata`` holds the
                file's description (a target without the key has none to check),
                ``mismatches`` what the target itself found wrong.
        """
        problems = list(found.get("mismatches", ()))
        told = found.get("metadata")
        if told is not None:
            wanted = {
                "model": self.model,
                "precision": self.precision,
                "recipe_sha256": self.recipe_sha256,
                "preprocessing": dict(self.preprocessing),
            }
            for key, value in wanted.items():
                have = _decoded(told.get(key), value)
                if have != _plain(value):
                    problems.append(
                        f"its metadata has {key} {_short(have)}; expected {_short(value)}"
                    )
            labels = file_labels(found)
            if labels != tuple(self.labels):
                problems.append(f"it has {_differing(labels, tuple(self.labels))}")
        for name, count in self.fusions.items():
            have = found.get("fusions", {name: count}).get(name, 0)
            if have != count:
                problems.append(f"it holds {have} {name}; expected {count}")
        for key in RECORDED:
            if key in self.details and key in found:
                have, value = _plain(found[key]), _plain(self.details[key])
                if have != value:
                    problems.append(
                        f"its {key} are not those of the manifest: {_first(have, value)}"
                    )
        if "stored" in self.details and "stored" in found:
            problems += changed(found["stored"], self.details["stored"])
        return tuple(problems)


def file_labels(found: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names in a finished file, in output order; None where it holds none."""
    told = found.get("metadata")
    if told is None:
        return None
    labels = found.get("labels", told.get("labels", ()))
    labels = _decoded(labels, [])
    return tuple(map(str, labels)) if isinstance(labels, list) else ()


def _decoded(have: Any, like: Any) -> Any:
    """Return a metadata value, which some formats keep as JSON text."""
    if isinstance(have, str) and not isinstance(like, str):
        try:
            return json.loads(have)
        except ValueError:
            return have
    return _plain(have)


def _plain(value: Any) -> Any:
    """Return a value as JSON would read it back (tuples as lists)."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{text[:40]}…" if len(text) > 41 else text


def _differing(have: tuple[str, ...] | None, wanted: tuple[str, ...]) -> str:
    have = have or ()
    if len(have) != len(wanted):
        return f"{len(have)} labels; expected {len(wanted)}"
    index = next(i for i, (a, b) in enumerate(zip(have, wanted, strict=True)) if a != b)
    return f"label {have[index]!r} for class {index}; expected {wanted[index]!r}"


def _first(have: Any, wanted: Any) -> str:
    """Say where two JSON values differ."""
    if isinstance(have, dict) and isinstance(wanted, dict):
        key = next(k for k in sorted({*have, *wanted}) if have.get(k) != wanted.get(k))
        return f"{key} {_short(have.get(key))}; expected {_short(wanted.get(key))}"
    if isinstance(have, list) and isinstance(wanted, list) and len(have) != len(wanted):
        return f"{len(have)} of them; expected {len(wanted)}"
    if isinstance(have, list) and isinstance(wanted, list):
        index = next(i for i, (a, b) in enumerate(zip(have, wanted, strict=True)) if a != b)
        return f"number {index} is {_short(have[index])}; expected {_short(wanted[index])}"
    return f"{_short(have)}; expected {_short(wanted)}"
