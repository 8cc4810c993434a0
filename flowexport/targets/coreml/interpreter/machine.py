"""Runs a saved package's program, operator by operator, checking every result's type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowexport.core.errors import ConversionError, InputError
from flowexport.targets.coreml.interpreter.arithmetic import Arithmetic, Mode
from flowexport.targets.coreml.interpreter.features import feed_tensor, result_array
from flowexport.targets.coreml.interpreter.handlers import (
    CONSTEXPR,
    HANDLERS,
    MOVES,
    TORCH_TYPES,
    Handler,
    StateCell,
)
from flowexport.targets.coreml.interpreter.program import Declared, Feature, load_package

Progress = Callable[[int, int, str], None]
"""``progress(done, total, operator type)`` after every operator."""

States = dict[str, StateCell]


class OpValue(NamedTuple):
    """One operator's result: type, name of the result, PyTorch module path, array.

    The array is float32 for a float16 result (exact mode keeps more than float16
    holds); a classifier's label and dictionary come as they are.
    """

    op_type: str
    output_name: str
    module_path: str | None
    array: Any


class _Slot(NamedTuple):
    """A value known at run time only."""

    name: str


@dataclass(frozen=True)
class _Step:
    op_type: str
    handler: Handler
    arguments: Mapping[str, Any]
    results: tuple[tuple[str, Declared | None], ...]
    arithmetic: Arithmetic
    last_uses: tuple[str, ...]


class Interpreter:
    """One function of a saved .mlpackage, ready to run on torch's CPU operators.

    Args:
        path: the .mlpackage folder; program and weights are read back from it.
        mode: see :class:`Mode`.
        function: of a multifunction package; None takes the default one.
        module_paths: PyTorch module path of results by name, for messages; a
            ``_cast_fp16`` suffix of the result's name is ignored.
        model: name for messages; the folder's by default.

    Attributes:
        inputs, outputs: the features of the package's description.
        operators: how many of each operator the program has (constants not counted).

    Raises:
        InputError, UnknownNameError: the package cannot be read, see ``load_package``.
        ConversionError: an operator that the interpreter does not know, control
            flow, or an ``inverse`` with an epsilon.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: Mode | str = Mode.EXACT,
        function: str | None = None,
        module_paths: Mapping[str, str] | None = None,
        model: str | None = None,
    ) -> None:
        try:
            self.mode = Mode(mode)
        except ValueError:
            modes = [m.value for m in Mode]
            raise InputError(
                f"load coreml {path.name}: mode is {mode!r}; expected one of {modes}."
            ) from None
        self.model = model or path.stem
        self._module_paths = dict(module_paths or {})
        package = load_package(path, function)
        self.function_name = package.function_name
        self.inputs: tuple[Feature, ...] = package.inputs
        self.outputs: tuple[Feature, ...] = package.outputs
        self._declared = package.declared
        self._state_types = package.states
        self._constants: dict[int, Any] = {}
        self._steps = self._compile(package.function)
        self._results = [self._reference(v) for v in package.function.outputs]
        self._result_names = [v.name for v in package.function.outputs]
        self._constants.clear()
        self.operators: Counter[str] = Counter(s.op_type for s in self._steps)

    # Compiling: once, when the package is loaded.

    def _compile(self, function: Any) -> tuple[_Step, ...]:
        operations = [
            op
            for op in function.operations
            if op.op_type != "const" and not op.op_type.startswith("constexpr_")
        ]
        unknown = Counter(o.op_type for o in function.operations if not _known(o.op_type))
        if unknown:
            listed = ", ".join(f"{name} ({count})" for name, count in sorted(unknown.items()))
            raise ConversionError(
                f"interpret coreml {self.model}: the program has operators that the interpreter"
                f" does not know: {listed}; expected one of its {len(HANDLERS)} handlers.",
                fix="add a handler in flowexport/targets/coreml/interpreter/handlers/",
            )
        last_use: dict[str, int] = {}
        for index, op in enumerate(operations):
            for var in op.get_flattened_inputs():
                last_use[var.name] = index
            # A result that nobody reads is freed at once.
            for var in op.outputs:
                last_use.setdefault(var.name, index)
        keep = {v.name for v in function.outputs} | set(self._state_types)
        released: dict[int, list[str]] = {}
        for name, index in last_use.items():
            if name not in keep:
                released.setdefault(index, []).append(name)
        return tuple(self._step(op, tuple(released.get(i, ()))) for i, op in enumerate(operations))

    def _step(self, op: Any, last_uses: tuple[str, ...]) -> _Step:
        results = tuple((v.name, self._declared.get(v.name)) for v in op.outputs)
        if op.op_type == "coreml_update_state" and results[0][1] is None:
            results = ((results[0][0], self._state_types[op.state.name]),)
        first = results[0][1]
        half = first is not None and first.dtype == "float16"
        arguments: dict[str, Any] = {}
        for name, value in op.inputs.items():
            if isinstance(value, (list, tuple)):
                arguments[name] = tuple(self._reference(v) for v in value)
            else:
                arguments[name] = self._reference(value)
        if op.op_type == "inverse" and float(arguments["epsilon"]) > 0:
            raise ConversionError(
                f"{self._place('inverse', results[0][0])} has epsilon"
                f" {float(arguments['epsilon']):g}; expected 0.",
                fix="write a / x instead of 1 / x: coremltools makes it a real_div, which is exact",
            )
        return _Step(
            op.op_type, HANDLERS[op.op_type], arguments, results,
            Arithmetic(self.mode, half), last_uses,
        )  # fmt: skip

    def _reference(self, var: Any) -> Any:
        """Return a constant's value (shared between its readers), or the slot of another value."""
        op = var.op
        if op is None or (op.op_type != "const" and not op.op_type.startswith("constexpr_")):
            return _Slot(var.name)
        if id(var) not in self._constants:
            if op.op_type == "const":
                value = var.val
            else:
                value = CONSTEXPR[op.op_type](op)
                if isinstance(value, tuple):
                    value = value[op.outputs.index(var)]
                declared = self._declared.get(var.name)
                if declared is not None and not declared.fits(np.shape(value)):
                    raise ConversionError(
                        f"{self._place(op.op_type, var.name)} has shape {np.shape(value)};"
                        f" expected {declared}."
                    )
            self._constants[id(var)] = self._constant(value)
        return self._constants[id(var)]

    def _constant(self, value: Any) -> Any:
        if value is None or isinstance(value, (str, list, tuple)):
            return value
        array = np.asarray(value)
        if array.dtype.kind in "US":
            return str(array) if array.ndim == 0 else array.tolist()
        if array.dtype == np.uint32:
            array = array.astype(np.int64)
        wanted = TORCH_TYPES[array.dtype.name]
        if array.dtype == np.uint16:
            array = array.astype(np.int32)
        if array.dtype.metadata or not array.flags.writeable or not array.flags.c_contiguous:
            array = np.array(array, dtype=array.dtype.name, order="C")
        tensor = torch.from_numpy(array).to(wanted)
        half = array.dtype == np.float16
        return Arithmetic(self.mode, half).stored(tensor)

    # Running.

    def new_states(self) -> States:
        """Return fresh states, all zeros, for ``run(states=...)``."""
        states = {}
        for name, declared in self._state_types.items():
            shape = tuple(d or 0 for d in declared.shape)
            states[name] = StateCell(torch.zeros(shape, dtype=TORCH_TYPES[declared.dtype]))
        return states

    def run(
        self,
        feeds: Mapping[str, Any],
        *,
        states: States | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Run once.

        Args:
            feeds: one array an input, of the description's dtype and a shape that it
                allows; an image also as (height, width, channels) uint8 in RGB.
            states: from :meth:`new_states`, changed in place; zeros if None.
            progress: called after every operator.

        Returns:
            One array an output; a classifier's label as str or int and its
            probabilities as a dict.

        Raises:
            InputError: a feed is missing, unknown, or does not fit.
            ConversionError: an operator failed, or its result is not what the
                program declares.
        """
        environment: dict[str, Any] = {}
        # Entered once: it costs as much as a small operator.
        with torch.inference_mode():
            for done, (step, _) in enumerate(self._execute(feeds, environment, states), 1):
                if progress is not None:
                    progress(done, len(self._steps), step.op_type)
        return self._collect(environment)

    def run_with_values(
        self, feeds: Mapping[str, Any], *, states: States | None = None
    ) -> Iterator[OpValue]:
        """Run once and yield every operator's results in execution order (for bisection)."""
        execution = self._execute(feeds, {}, states)
        while True:
            # Not held over a yield, where it would reach the caller's own code.
            with torch.inference_mode():
                done = next(execution, None)
            if done is None:
                return
            step, values = done
            for (name, _), value in zip(step.results, values, strict=True):
                array = value.numpy() if isinstance(value, Tensor) else value
                yield OpValue(step.op_type, name, self.module_path(name), array)

    def module_path(self, name: str) -> str | None:
        """Return the PyTorch module path of a result, or None where it is not known."""
        return self._module_paths.get(name) or self._module_paths.get(
            name.removesuffix("_cast_fp16").removesuffix("_cast_fp32")
        )

    def declared_dtype(self, name: str) -> str | None:
        """Return the storage type that the program declares for a result."""
        declared = self._declared.get(name)
        return None if declared is None else declared.dtype

    def _execute(
        self, feeds: Mapping[str, Any], environment: dict[str, Any], states: States | None
    ) -> Iterator[tuple[_Step, Sequence[Any]]]:
        where = f"run coreml {self.model}"
        if set(feeds) != {f.name for f in self.inputs}:
            raise InputError(
                f"{where}: the feeds are {sorted(feeds)};"
                f" expected {sorted(f.name for f in self.inputs)}."
            )
        for feature in self.inputs:
            declared = self._declared[feature.name]
            tensor = feed_tensor(feature, feeds[feature.name], where)
            half = declared.dtype == "float16"
            environment[feature.name] = Arithmetic(self.mode, half).stored(tensor)
        cells = self.new_states() if states is None else states
        if set(cells) != set(self._state_types):
            raise InputError(
                f"{where}: the states are {sorted(cells)}; expected {sorted(self._state_types)}."
            )
        environment.update(cells)
        for step in self._steps:
            values = self._evaluate(step, environment)
            yield step, values
            for name in step.last_uses:
                environment.pop(name, None)

    def _evaluate(self, step: _Step, environment: dict[str, Any]) -> Sequence[Any]:
        arguments = {}
        for name, value in step.arguments.items():
            if type(value) is _Slot:
                value = environment[value.name]
            elif type(value) is tuple:
                value = tuple(environment[v.name] if type(v) is _Slot else v for v in value)
            arguments[name] = value
        try:
            outcome = step.handler(step.arithmetic, **arguments)
        except Exception as error:
            raise ConversionError(
                f"{self._place(step.op_type, step.results[0][0])} failed: {error}."
            ) from error
        values = outcome if isinstance(outcome, tuple) else (outcome,)
        if len(values) != len(step.results):
            raise ConversionError(
                f"{self._place(step.op_type, step.results[0][0])} has {len(values)} results;"
                f" expected {len(step.results)}."
            )
        stored = []
        for (name, declared), value in zip(step.results, values, strict=True):
            if declared is not None:
                self._check(step, name, declared, value)
                if declared.dtype == "float16" and step.op_type not in MOVES:
                    value = step.arithmetic.stored(value)
            elif not isinstance(value, (str, int, dict)):
                raise ConversionError(
                    f"{self._place(step.op_type, name)} has no declared tensor type."
                )
            environment[name] = value
            stored.append(value)
        return stored

    def _check(self, step: _Step, name: str, declared: Declared, value: Any) -> None:
        if not isinstance(value, Tensor):
            if declared.dtype in ("string", "int64") and isinstance(value, (str, int)):
                return
            raise ConversionError(
                f"{self._place(step.op_type, name)} is a {type(value).__name__};"
                f" expected {declared}."
            )
        if value.dtype != TORCH_TYPES.get(declared.dtype) or not declared.fits(tuple(value.shape)):
            sizes = "x".join(map(str, value.shape)) or "scalar"
            raise ConversionError(
                f"{self._place(step.op_type, name)} has {str(value.dtype).removeprefix('torch.')}"
                f" {sizes}; expected {declared}."
            )

    def _place(self, op_type: str, name: str) -> str:
        path = self.module_path(name)
        module = f", module {path}" if path else ""
        return (
            f"interpret coreml {self.model}: {op_type} {name} (block {self.function_name}{module})"
        )

    def _collect(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        values = {
            name: environment[r.name] if isinstance(r, _Slot) else r
            for name, r in zip(self._result_names, self._results, strict=True)
        }
        outputs = {}
        for feature in self.outputs:
            if feature.name not in values:
                raise ConversionError(
                    f"interpret coreml {self.model}: output {feature.name} is no result of block"
                    f" {self.function_name}; expected one of {sorted(values)}."
                )
            declared = self._declared.get(feature.name)
            outputs[feature.name] = result_array(feature, declared, values[feature.name])
        return outputs


def _known(op_type: str) -> bool:
    return op_type == "const" or op_type in HANDLERS or op_type in CONSTEXPR
