"""Entries that other packages add by an entry point, imported when first asked for."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from flowexport.core.errors import FlowExportError, UnavailableError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """The entries of one entry-point group, imported when first asked for.

    Args:
        group: entry-point group.
        kind: what an entry is called in messages.
        mapping: whether an entry point is a mapping of names to entries
            rather than one entry.
    """

    def __init__(self, group: str, kind: str, *, mapping: bool = False) -> None:
        self.group = group
        self.kind = kind
        self.mapping = mapping
        self._loaded: dict[str, T] = {}
        self._broken: dict[str, str] = {}

    @cached_property
    def _points(self) -> dict[str, importlib.metadata.EntryPoint]:
        points: dict[str, importlib.metadata.EntryPoint] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            if point.name in points and points[point.name].value != point.value:
                first = points[point.name].value
                self._broken[f"{point.name} ({point.value})"] = f"the name is taken by {first}"
                continue
            points[point.name] = point
        return points

    def _import(self, name: str) -> Any:
        """Import one entry point; None, and its reason kept, where that fails."""
        if name in self._broken:
            return None
        point = self._points[name]
        try:
            return point.load()
        except Exception as error:  # a plugin may raise anything; the others go on
            line = (str(error).strip().splitlines() or [""])[0]
            self._broken[name] = f"{point.value} cannot be imported: {type(error).__name__}: {line}"
            return None

    def _load_mappings(self) -> None:
        for point in self._points:
            if self.mapping and point not in self._seen:
                self._seen.add(point)
                for name, entry in (self._import(point) or {}).items():
                    self._loaded.setdefault(name, entry)

    @cached_property
    def _seen(self) -> set[str]:
        return set()

    def names(self) -> list[str]:
        """Return every name, sorted; imports nothing where a name is an entry point's."""
        if not self.mapping:
            return sorted(self._points)
        self._load_mappings()
        return sorted(self._loaded)

    def get(self, name: str, *, where: str | None = None) -> T:
        """Return one entry.

        Raises:
            UnknownNameError: nothing has this name.
            UnavailableError: its package cannot be imported.
        """
        if name not in self.names():
            raise UnknownNameError(self.kind, name, self.names(), where=where)
        if name not in self._loaded:
            entry = self._import(name)
            if entry is None:
                raise UnavailableError(
                    f"{self.kind} {name}: {self._broken[name]}.", fix=self.repair(name)
                )
            self._loaded[name] = entry
        return self._loaded[name]

    def working(self) -> dict[str, T]:
        """Return every entry that can be imported."""
        found: dict[str, T] = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except FlowExportError:
                continue
        return found

    def repair(self, name: str) -> str | None:
        """Return the command that installs a broken entry's package anew."""
        point = self._points.get(name)
        return f"pip install --force-reinstall {point.dist.name}" if point and point.dist else None

    def broken(self) -> Mapping[str, str]:
        """Return why each entry that cannot be imported cannot, after trying all."""
        self.working()
        return dict(self._broken)
