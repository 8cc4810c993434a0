"""From a lowered program to an ML Program package."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import ConversionError, FlowExportError, InputError
from flowexport.core.types import Precision, TensorSpec
from flowexport.lowering import LoweredProgram
from flowexport.lowering.streaming import state_nodes
from flowexport.ops.installed import installed_ops
from flowexport.targets.coreml.ends import LABEL, SOFTMAX, ImageEnd
from flowexport.targets.coreml.places import STATE, half_selector, named_results, number_nodes

_DTYPES = ("float32", "float16", "int32", "int64")


@dataclass(frozen=True)
class Written:
    """What is known of a package from its making.

    Attributes:
        paths: PyTorch module path by result name.
        kept: results by the ``keep_fp32`` rule that keeps them in float32.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, list[str]] = field(default_factory=dict)


@cache
def _register_operators() -> None:
    """Give coremltools the operators that it lacks or rounds.

    ``alias`` is missing (a tied weight or a view of a whole tensor makes one), and so is
    ``new_ones``, which the forms of a dynamic length have.
    ``reciprocal`` becomes ``inverse`` with ε = 1e-4, that is 1/(x + 1e-4).
    ``gelu`` overlooks ``approximate="tanh"``, which torch.export gives by its name.
    """
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs

    def alias(context: Any, node: Any) -> None:
        context.add(context[node.inputs[0]], torch_name=node.name)

    def reciprocal(context: Any, node: Any) -> None:
        x = context[node.inputs[0]]
        context.add(Builder.real_div(x=np.float32(1), y=x, name=node.name))

    def new_ones(context: Any, node: Any) -> None:
        shape = _get_inputs(context, node)[1]
        if isinstance(shape, list):  # a dynamic size is a list of scalars
            shape = Builder.concat(values=shape, axis=0)
        context.add(Builder.fill(shape=shape, value=np.float32(1), name=node.name))

    def gelu(context: Any, node: Any) -> None:
        x, *rest = _get_inputs(context, node)
        told = [getattr(v, "val", v) for v in _get_kwinputs(context, node, "approximate", rest)]
        mode = "TANH_APPROXIMATION" if told == ["tanh"] else "EXACT"
        context.add(Builder.gelu(x=x, mode=mode, name=node.name))

    for translate in (alias, reciprocal, new_ones, gelu):
        register_torch_op(override=True)(translate)


@cache
def _forget_output_types() -> str:
    """Register a pass that drops the outputs' asked types once the program has them.

    coremltools 9.0 reads them by position behind the classifier's two new outputs, and
    fails where there is any other output.
    """
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace="flowexport")  # type: ignore[misc]
    class forget_output_types(AbstractGraphPass):  # type: ignore[misc]  # noqa: N801
        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                function.set_output_types(None)

    return "flowexport::forget_output_types"


@cache
def _keep_classifier_last() -> None:
    """Let no cast be moved behind the classifier's end when a finished program is read again.

    coremltools 9.0 writes the classes into ``classify`` where that is the last operator of a
    function, and else fails at their list; compressing a package's weights orders it anew.
    """
    from coremltools.converters.mil.mil.passes.defs.cleanup import topological_reorder as usual
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace="common", override=True)  # type: ignore[misc]
    class topological_reorder(usual):  # type: ignore[misc]  # noqa: N801
        def apply(self, prog: Any) -> None:
            kinds = {op.op_type for f in prog.functions.values() for op in f.operations}
            if "classify" not in kinds:
                super().apply(prog)


def require_dtypes(inputs: Sequence[TensorSpec], where: str) -> None:
    """Raise InputError for an input of a dtype that no package takes."""
    for spec in inputs:
        if spec.dtype not in _DTYPES:
            raise InputError(
                f"{where}: {spec.name} has dtype {spec.dtype};"
                f" expected one of: {', '.join(_DTYPES)}."
            )


def stored(spec: TensorSpec) -> TensorSpec:
    """Return an input or output as a package has it: Core ML knows no int64, so it is int32.

    The session converts at the border (:class:`~flowexport.targets.coreml.ends.AppEnds`).
    """
    return replace(spec, dtype="int32") if spec.dtype == "int64" else spec


def check_flexible(inputs: Sequence[TensorSpec], sizes: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless the inputs' named dimensions are those that ``flexible`` names."""
    named = {d for s in inputs for d in s.shape if isinstance(d, str)} - {"batch"}
    if named != set(sizes):
        raise InputError(
            f"{where}: flexible has {', '.join(sizes)}, and the inputs have the named dimensions"
            f" {', '.join(sorted(named)) or 'none'}; expected the same.",
            fix="--input x:batchxlengthx12 names a dimension",
        )


@contextlib.contextmanager
def _told_in_a_line(model: str, what: str) -> Iterator[None]:
    """Turn whatever coremltools raises, from AssertionError up, into one message."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except FlowExportError:
            raise
        except Exception as error:
            raise ConversionError(
                f"convert coreml {model}: coremltools refused {what}:"
                f" {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            ) from error


def join_packages(packages: Mapping[str, Path], main: str, model: str, path: Path) -> None:
    """Save one package that holds each of these as a function; equal weights are stored once.

    Args:
        packages: by function name.
        main: the default function.
        model: the model's name, for messages.
        path: of the .mlpackage to write.

    Raises:
        ConversionError: coremltools refused to join them.
    """
    import coremltools as ct

    joined = ct.utils.MultiFunctionDescriptor()
    with _told_in_a_line(model, f"to join the functions {', '.join(packages)}"):
        for name, source in packages.items():
            joined.add_function(str(source), "main", name)
        joined.default_function_name = main
        ct.utils.save_multifunction(joined, str(path))


def to_package(
    program: LoweredProgram,
    precision: Precision,
    system: str,
    path: Path,
    *,
    image: ImageEnd | None = None,
    classes: tuple[str, ...] = (),
    keep_fp32: tuple[str, ...] = (),
    sizes: Mapping[str, Any] | None = None,
    compress: Callable[[Any], Any] | None = None,
) -> Written:
    """Convert a program without attention nodes and save it.

    Args:
        program: float32 inside; inputs and outputs give the names and types.
        precision: what Core ML stores and computes in; the ends stay float32.
        system: minimum deployment target, ``iOS16`` and later.
        path: of the .mlpackage.
        image: the input that is an image, or None.
        classes: labels of a classifier, whose probabilities are the output ``probabilities``.
        keep_fp32: in FP16, what stays in float32; see :mod:`~flowexport.targets.coreml.places`.
        compress: takes the converted model, returns the one to save.
        sizes: of a dynamic dimension: ``{length: {"range": [8, 64]}}`` or ``{"sizes": [...]}``.

    Raises:
        ConversionError: coremltools refused the program.
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder

    logging.getLogger("coremltools").setLevel(logging.ERROR)
    _register_operators()
    # It numbers constants through everything that was built or joined before in this process.
    Builder.name_count.clear()
    exported = program.exported.run_decompositions({})
    state = state_nodes(replace(program, exported=exported)) if precision is Precision.FP16 else ()
    places = number_nodes(exported, [str(op.overload) for op in installed_ops()], state)
    if state:
        keep_fp32 = (*keep_fp32, STATE)
    compute: Any = {Precision.FP32: ct.precision.FLOAT32, Precision.FP16: ct.precision.FLOAT16}[
        precision
    ]
    if keep_fp32:
        compute = ct.transform.FP16ComputePrecision(op_selector=half_selector(keep_fp32, places))
    pipeline = ct.PassPipeline.DEFAULT
    # It writes x * a + b as a batch norm of variance 1 and ε = 1e-5: 5e-6 too small.
    pipeline.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    more: dict[str, Any] = {"pass_pipeline": pipeline}
    if classes:
        _keep_classifier_last()
        pipeline.append_pass(_forget_output_types())
        more["classifier_config"] = ct.ClassifierConfig(
            list(classes), predicted_feature_name=LABEL, predicted_probabilities_output=SOFTMAX
        )
    with _told_in_a_line(program.model, "the program"):
        model = ct.convert(
            exported,
            inputs=[
                image.ct_type()
                if image is not None and image.name == s.name
                else ct.TensorType(
                    name=s.name, shape=_shape(s, sizes or {}), dtype=np.dtype(s.dtype).type
                )
                for s in map(stored, program.inputs)
            ],
            outputs=[
                ct.TensorType(name=s.name, dtype=np.dtype(stored(s).dtype).type)
                for s in program.outputs
            ],
            convert_to="mlprogram",
            compute_precision=compute,
            minimum_deployment_target=ct.target[system],
            skip_model_load=True,
            **more,
        )
        # Compressing loads the program anew, without the places.
        written = Written(*named_results(model._mil_program, places, keep_fp32))
        if compress is not None:
            model = compress(model)
        model.save(str(path))
    return written


def _shape(spec: TensorSpec, sizes: Mapping[str, Any]) -> Any:
    """Return a shape as coremltools takes it: numbers, a range, or the shapes allowed."""
    import coremltools as ct

    names = [d for d in spec.shape if isinstance(d, str)]
    if not names:
        return spec.shape
    limits = sizes[names[0]]
    if "sizes" in limits:
        return ct.EnumeratedShapes(
            [spec.static(**{names[0]: n}).shape for n in limits["sizes"]],
            default=spec.static(**{names[0]: limits["sizes"][-1]}).shape,
        )
    low, high = limits["range"]
    return tuple(
        ct.RangeDim(low, high, default=high) if isinstance(d, str) else d for d in spec.shape
    )
