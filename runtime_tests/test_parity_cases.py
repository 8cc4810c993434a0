"""Cases, the float64 reference, and what is stored of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence_fakes import INPUTS, dataset, evaluation, golden

from flowexport.core.errors import BundleError, InputError
from flowexport.core.types import TensorSpec
from flowexport.parity import (
    make_cases,
    read_evaluation,
    read_golden,
    reference_outputs,
    write_evaluation,
    write_golden,
)


def test_cases_fit_the_specs_and_masks_are_valid() -> None:
    cases = make_cases(INPUTS, dataset())
    assert {"random-0", "random-1", "random-2", "zeros", "large", "one-step", "batch-3"} <= set(
        cases
    )
    assert sum(name.startswith("sample-") for name in cases) == 3
    for name, feeds in cases.items():
        assert list(feeds) == [s.name for s in INPUTS]
        for spec in INPUTS:
            spec.check(feeds[spec.name], name)
        mask = feeds["padding_mask"]
        assert set(np.unique(mask)) <= {0.0, 1.0}
        assert (mask[:, 0] == 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
    assert cases["one-step"]["padding_mask"].sum() == 1
    assert not cases["zeros"]["x"].any() and cases["zeros"]["padding_mask"].all()
    assert np.abs(cases["large"]["x"]).max() > 5
    assert len(cases["batch-3"]["x"]) == 3


def test_real_samples_are_of_different_classes_and_unchanged() -> None:
    data = dataset()
    picks = [int(n.split("-")[1]) for n in make_cases(INPUTS, data) if n.startswith("sample-")]
    assert len({int(data.targets[i]) for i in picks}) == 3
    cases = make_cases(INPUTS, data)
    for i in picks:
        np.testing.assert_array_equal(cases[f"sample-{i}"]["x"], data.inputs["x"][i : i + 1])


def test_cases_repeat_by_seed_alone() -> None:
    one, two, other = (make_cases(INPUTS, dataset(), seed=s) for s in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name]["x"], two[name]["x"])
    assert not np.array_equal(one["random-0"]["x"], other["random-0"]["x"])


def test_other_inputs() -> None:
    specs = (TensorSpec("tokens", (1, 5), "int64"), TensorSpec("keep_mask", (1, 5), "bool"))
    cases = make_cases(specs, None)
    assert "batch-3" not in cases  # the batch is fixed
    for feeds in cases.values():
        assert feeds["tokens"].dtype == np.int64 and set(np.unique(feeds["tokens"])) <= {0, 1}
        assert feeds["keep_mask"].dtype == np.bool_
    with pytest.raises(InputError, match="no input"):
        make_cases((), None)
    with pytest.raises(InputError, match="image"):
        make_cases((TensorSpec("image", ("batch", 3)),), dataset())


class Doubler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.float64 and count.dtype == torch.int64 and len(x) <= 32
        return self.dropout(self.linear(x)), x.sum(1) + count


def test_reference_is_float64_in_eval_mode_and_leaves_the_module_alone() -> None:
    module = Doubler().train()
    x = np.random.default_rng(0).standard_normal((70, 3)).astype(np.float32)
    count = np.arange(70)
    found = reference_outputs(module, {"a": {"x": x, "count": count}}, ("y", "sum"))["a"]
    assert module.training and module.linear.weight.dtype == torch.float32
    weight = module.linear.weight.detach().numpy().astype(np.float64)
    bias = module.linear.bias.detach().numpy().astype(np.float64)
    np.testing.assert_allclose(found["y"], x.astype(np.float64) @ weight.T + bias, rtol=1e-13)
    np.testing.assert_allclose(found["sum"], x.astype(np.float64).sum(1) + count, rtol=1e-13)
    with pytest.raises(InputError, match="2 results"):
        reference_outputs(module, {"a": {"x": x, "count": count}}, ("y",))
    x[3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        reference_outputs(module, {"a": {"x": x, "count": count}}, ("y", "sum"))


def test_golden_round_trip(tmp_path: Path) -> None:
    made = golden()
    write_golden(tmp_path / "golden", made.cases, made.expected, subject="abc")
    read = read_golden(tmp_path / "golden", subject="abc")
    assert list(read.cases) == list(made.cases)
    for case, outputs in made.expected.items():
        for name, value in outputs.items():
            assert read.expected[case][name].dtype == np.float64
            np.testing.assert_array_equal(read.expected[case][name], value)
        for name, value in made.cases[case].items():
            np.testing.assert_array_equal(read.cases[case][name], value)


def write_both(folder: Path) -> None:
    made, judged = golden(), evaluation()
    write_golden(folder / "golden", made.cases, made.expected, subject="abc")
    write_evaluation(
        folder / "evaluation", judged.dataset, "logits", judged.reference_logits, subject="abc"
    )


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


READERS = {"golden": read_golden, "evaluation": read_evaluation}


@pytest.mark.parametrize("kind", READERS)
def test_broken_files_are_refused(kind: str, tmp_path: Path) -> None:
    read, folder = READERS[kind], tmp_path / kind
    with pytest.raises(BundleError, match="missing"):
        read(folder)
    write_both(tmp_path)
    read(folder, subject="abc")
    with pytest.raises(BundleError, match="written for"):
        read(folder, subject="another model")
    tensors = next(folder.glob("*.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-8])
    with pytest.raises(BundleError, match="sha256"):
        read(folder)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    tensors.write_bytes(bytes(flipped))
    with pytest.raises(BundleError, match="sha256"):
        read(folder)
    tensors.unlink()
    with pytest.raises(BundleError, match="missing"):
        read(folder)
    write_both(tmp_path)
    edit_index(folder, schema="flowexport.golden/99")
    with pytest.raises(BundleError, match="schema"):
        read(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(BundleError, match="JSON"):
        read(folder)


def test_index_must_list_exactly_what_is_there(tmp_path: Path) -> None:
    write_both(tmp_path)
    folder = tmp_path / "golden"
    listing = json.loads((folder / "index.json").read_text())["cases"]
    fewer = dict(list(listing.items())[1:])
    edit_index(folder, cases=fewer)
    with pytest.raises(BundleError, match="not in the index"):
        read_golden(folder)
    edit_index(folder, cases={**listing, "more": listing["zeros"]})
    with pytest.raises(BundleError, match="differ"):
        read_golden(folder)
    write_both(tmp_path)
    edit_index(tmp_path / "evaluation", samples=39)
    with pytest.raises(BundleError, match="samples"):
        read_evaluation(tmp_path / "evaluation")


def test_nothing_is_not_written(tmp_path: Path) -> None:
    made = golden()
    with pytest.raises(BundleError):
        write_golden(tmp_path, {}, {})
    with pytest.raises(BundleError):
        write_golden(tmp_path, made.cases, {"zeros": made.expected["zeros"]})
    with pytest.raises(BundleError):
        write_evaluation(tmp_path, dataset(), "logits", np.zeros((3, 4)))


def test_evaluation_round_trip(tmp_path: Path) -> None:
    write_both(tmp_path)
    made, read = evaluation(), read_evaluation(tmp_path / "evaluation")
    assert read.dataset.labels == made.dataset.labels
    assert read.dataset.attribution == made.dataset.attribution
    np.testing.assert_array_equal(read.dataset.targets, made.dataset.targets)
    np.testing.assert_array_equal(read.reference_logits, made.reference_logits)
