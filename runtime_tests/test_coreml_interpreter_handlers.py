"""Every handler of the Core ML interpreter: saved, read back, run, compared with torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ct = pytest.importorskip("coremltools", reason="coremltools is not installed")

from coreml_interpreter_cases import CASES as SMALL  # noqa: E402
from coreml_interpreter_cases import MIL_TYPES, Case  # noqa: E402
from coreml_interpreter_layers import LAYERS, MODULES  # noqa: E402
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813
from coremltools.converters.mil.mil import Function, Program, types  # noqa: E402

from flowexport.core.types import Options, TensorSpec  # noqa: E402
from flowexport.lowering import lower  # noqa: E402
from flowexport.targets.coreml import TARGET  # noqa: E402
from flowexport.targets.coreml.interpreter import Interpreter, machine  # noqa: E402
from flowexport.targets.coreml.interpreter.handlers import (  # noqa: E402
    _KINDS,
    CONSTEXPR,
    HANDLERS,
)

CASES = [*SMALL, *LAYERS]
# Operators whose test is not a case: they need weights, states or a classifier.
ELSEWHERE = {"classify", "coreml_update_state", "read_state"}
RELATIVE = 2e-6  # float32: the same torch kernels, or sums of at most a hundred terms


def package(cases: Sequence[Case], folder: Path) -> Path:
    """Save one package with every case's operator on inputs ``<case>_<input>``."""
    placeholders = {
        f"in_{c}_{i}": mb.placeholder(feed.shape, MIL_TYPES[feed.dtype.name])
        for c, case in enumerate(cases)
        for i, feed in enumerate(case.feeds)
    }
    outputs = []
    with Function(placeholders, opset_version=ct.target.iOS18) as function:
        for c, case in enumerate(cases):
            arguments = [function.inputs[f"in_{c}_{i}"] for i in range(len(case.feeds))]
            results = case.make(*arguments)
            for r, result in enumerate(
                results if isinstance(results, (list, tuple)) else [results]
            ):
                # A package's outputs are float32 or int32.
                name = f"out_{c}_{r}"
                narrow = result.dtype not in (types.fp32, types.int32)
                outputs.append(
                    mb.cast(x=result, dtype="int32", name=name)
                    if narrow
                    else mb.identity(x=result, name=name)
                )
        function.set_outputs(outputs)
    program = Program()
    program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    path = folder / "cases.mlpackage"
    model.save(str(path))
    return path


def feeds_of(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    return {
        f"in_{c}_{i}": feed for c, case in enumerate(cases) for i, feed in enumerate(case.feeds)
    }


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """All cases in one package, written and read back once."""
    return Interpreter(package(CASES, tmp_path_factory.mktemp("cases")))


@pytest.fixture(scope="module")
def results(interpreter: Interpreter) -> dict[str, np.ndarray]:
    return interpreter.run(feeds_of(CASES))


def inferred(case: Case) -> list[np.ndarray] | None:
    """Return coremltools' own values for the case, or None where it has none."""
    found: list[Any] = []

    def block() -> Any:
        constants = [mb.const(val=f) for f in case.feeds]
        results = case.make(*constants)
        listed = results if isinstance(results, (list, tuple)) else [results]
        found.extend(r.val for r in listed)
        return tuple(mb.identity(x=r) for r in listed)

    try:
        mb.program(input_specs=[], opset_version=ct.target.iOS18)(block)
    except Exception:
        # coremltools 9.0's inference of some operators (reduce_sum) breaks with numpy 2.4.
        return None
    return None if not found or any(v is None for v in found) else [np.asarray(v) for v in found]


def assert_equal(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    if want.dtype.kind == "f":
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=RELATIVE, atol=RELATIVE)
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_handler_equals_torch(case: Case, results: dict[str, np.ndarray]) -> None:
    number = CASES.index(case)
    got = [v for n, v in results.items() if n.startswith(f"out_{number}_")]
    want = case.want(*(torch.from_numpy(f) for f in case.feeds))
    wanted = want if isinstance(want, tuple) else (want,)
    assert len(got) == len(wanted)
    for value, expected in zip(got, wanted, strict=True):
        assert_equal(value, expected.numpy())


def test_the_cases_run_the_operators_that_they_name(interpreter: Interpreter) -> None:
    # A builder that rewrites an operator into another would leave a handler untested.
    for op, count in Counter(c.op for c in CASES).items():
        assert interpreter.operators[op] >= count, op


def test_handlers_equal_coremltools_value_inference() -> None:
    compared = set()
    for case in CASES:
        values = None if case.distrust else inferred(case)
        if values is None:
            continue
        want = case.want(*(torch.from_numpy(f) for f in case.feeds))
        wanted = want if isinstance(want, tuple) else (want,)
        for value, expected in zip(values, wanted, strict=True):
            np.testing.assert_allclose(
                value.astype(np.float64),
                expected.numpy().astype(np.float64),
                rtol=1e-5,
                atol=1e-5,
                err_msg=case.id,
            )
        compared.add(case.op)
    # The check must not vanish with a coremltools release.
    assert len(compared) >= 60, sorted(compared)


@pytest.mark.parametrize("name", MODULES)
def test_layers_as_torch_users_write_them(name: str, tmp_path: Path) -> None:
    module, shape, operators = MODULES[name]
    spec = TensorSpec("x", ("batch", *shape[1:]))
    artifact = TARGET.convert(
        lower(module.eval(), [spec], ["y"], name="layers", ops=()), Options(), tmp_path
    )
    assert operators <= set(artifact.details["operators"])
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    assert_equal(Interpreter(artifact.path).run({"x": x})["y"], want)


def test_every_handler_has_a_case() -> None:
    covered = {c.op for c in CASES} | ELSEWHERE
    assert set(HANDLERS) - covered == set()
    assert covered - set(HANDLERS) == set()


def test_coverage_is_counted_over_coremltools_own_registry() -> None:
    from flowexport.targets.coreml.interpreter.__main__ import coverage, table
    from flowexport.targets.coreml.interpreter.handlers import CONSTEXPR, HANDLERS

    kinds = coverage()
    known = {name for names, _ in kinds.values() for name in names}
    unknown = {name for _, names in kinds.values() for name in names}
    assert not known & unknown and {"conv", "read_state"} <= known and "gru" in unknown
    # Handlers of operators that the registry does not list as core ones are told by nobody.
    assert known <= {*HANDLERS, *CONSTEXPR, "const"}
    text = table(kinds)
    assert text.endswith(
        f"{len(known)} of {len(known) + len(unknown)} operators of the ML Program dialect."
    )


def test_no_operator_has_two_handlers() -> None:
    assert sum(len(kind.HANDLERS) for kind in _KINDS) == len(HANDLERS)
    assert not set(HANDLERS) & set(CONSTEXPR)


def test_a_wrong_handler_fails_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [next(c for c in CASES if c.op == "sub")]
    broken = {**HANDLERS, "sub": lambda math, *, x, y: y - x}
    monkeypatch.setattr(machine, "HANDLERS", broken)
    got = Interpreter(package(cases, tmp_path)).run(feeds_of(cases))["out_0_0"]
    with pytest.raises(AssertionError):
        assert_equal(got, cases[0].feeds[0] - cases[0].feeds[1])
