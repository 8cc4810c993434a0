"""Shipped data: sizes, preprocessing as documented, and equal to their sources."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flowexport_models import DATASETS, MODELS
from flowexport_models.data import FOLDER, pad_series, resize_bilinear
from flowexport_models.data.prepare import parse_ts
from torch.nn import functional as F

from flowexport.core.errors import InputError

SIZES = {
    "japanese-vowels-train": 270,
    "japanese-vowels-test": 370,
    "japanese-vowels-stream-train": 270,
    "japanese-vowels-stream-test": 370,
    "digits-train": 1437,
    "digits-test": 360,
}


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_fits_the_models_inputs(name: str) -> None:
    data = DATASETS[name]()
    assert data.name == name and len(data) == SIZES[name]
    spec = next(s for s in MODELS.values() if s.dataset == name.replace("train", "test"))
    assert list(data.inputs) == [s.name for s in spec.inputs]
    for tensor in spec.inputs:
        tensor.check(data.inputs[tensor.name], name)
        assert len(data.inputs[tensor.name]) == len(data)
    assert data.labels == spec.labels
    assert data.targets.dtype == np.int64
    assert set(data.targets) == set(range(len(data.labels)))
    assert "CC BY 4.0" in data.attribution


def test_splits_share_no_sample() -> None:
    for family in ("digits", "japanese-vowels"):
        parts = []
        for split in ("train", "test"):
            values = next(iter(DATASETS[f"{family}-{split}"]().inputs.values()))
            parts.append({hashlib.sha256(v.tobytes()).hexdigest() for v in values})
        assert not parts[0] & parts[1]


def test_japanese_vowels_masks_are_the_series() -> None:
    data = DATASETS["japanese-vowels-test"]()
    x, mask = data.inputs["x"], data.inputs["padding_mask"]
    lengths = mask.sum(1)
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert lengths.min() == 7 and lengths.max() == 29
    assert (np.diff(mask, axis=1) <= 0).all()  # ones, then zeros
    assert not x[mask == 0].any()
    assert (np.abs(x[mask == 1]).max(axis=1) > 0).all()
    # The class sizes that the UCI archive documents.
    assert np.bincount(data.targets).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]


def test_japanese_vowels_are_standardised_by_the_training_set() -> None:
    training = DATASETS["japanese-vowels-train"]().inputs
    recorded = training["x"][training["padding_mask"] == 1].astype(np.float64)
    np.testing.assert_allclose(recorded.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(recorded.std(0), 1, atol=1e-5)


def test_digits_equal_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    from safetensors.numpy import load_file

    source = sklearn.load_digits()
    shipped = load_file(FOLDER / "digits.safetensors")
    assert np.array_equal(shipped["images"], source.images)
    assert np.array_equal(shipped["targets"], source.target)
    both = np.concatenate([shipped["train/index"], shipped["test/index"]])
    assert np.array_equal(np.sort(both), np.arange(1797))


def test_digits_prepare_makes_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from flowexport_models.data.prepare import prepare_digits

    assert prepare_digits(tmp_path).read_bytes() == (FOLDER / "digits.safetensors").read_bytes()


def test_resize_is_torchs_bilinear() -> None:
    images = np.random.default_rng(0).random((5, 8, 8))
    expected = F.interpolate(
        torch.from_numpy(images)[:, None], size=(32, 32), mode="bilinear", align_corners=False
    )[:, 0]
    np.testing.assert_allclose(resize_bilinear(images, 32), expected.numpy(), atol=1e-6)


TS = "@problemName X\n@data\n1,2,3:4,5,6:1\n7:-8E-1:2\n"


def test_ts_parser() -> None:
    steps, lengths, targets = parse_ts(TS)
    assert lengths.tolist() == [3, 1] and targets.tolist() == [0, 1]
    np.testing.assert_array_equal(steps, np.array([[1, 4], [2, 5], [3, 6], [7, -0.8]], np.float32))
    padded = pad_series(steps, lengths, 4)
    assert padded["padding_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert padded["x"][1].tolist() == [[7, np.float32(-0.8)], [0, 0], [0, 0], [0, 0]]


def test_bad_series_are_refused() -> None:
    with pytest.raises(InputError, match="@data"):
        parse_ts("1,2:3,4:1")
    with pytest.raises(InputError, match="sample 1 has channels of unequal"):
        parse_ts("@data\n1,2:3:1")
    with pytest.raises(InputError, match="has 3 steps; expected at most 2"):
        pad_series(np.zeros((3, 1), np.float32), np.array([3]), 2)


def test_prepare_refuses_another_wheel(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_text("no zip")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flowexport_models.data.prepare",
            "japanese-vowels",
            "--wheel",
            str(tmp_path / "x.whl"),
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no aeon wheel" in done.stderr and "Traceback" not in done.stderr
    assert "pip download" in done.stderr


def test_importing_the_catalog_loads_no_torch() -> None:
    code = (
        "import sys, flowexport_models as m; m.DATASETS['digits-test'](); m.MODELS;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
