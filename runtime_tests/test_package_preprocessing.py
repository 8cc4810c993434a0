"""The steps of a package are the evaluation's own preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
from flowexport_models.data import (
    DIGITS_PREPROCESSING,
    JAPANESE_VOWELS_PREPROCESSING,
    JAPANESE_VOWELS_STREAM_PREPROCESSING,
    _read,
    digits,
    japanese_vowels,
)

from flowexport.core.errors import InputError, UnknownNameError
from flowexport.package.preprocessing import (
    MAX_ABS,
    apply_steps,
    area_weights,
    draw_strokes,
    golden_samples,
    make_inputs,
)

FLOAT = {"image": "float32", "x": "float32", "padding_mask": "float32"}
SOURCES = {
    **{f"digits-{s['name']}": s for s in DIGITS_PREPROCESSING["sources"]},
    **{f"vowels-{s['name']}": s for s in JAPANESE_VOWELS_PREPROCESSING["sources"]},
    **{f"stream-{s['name']}": s for s in JAPANESE_VOWELS_STREAM_PREPROCESSING["sources"]},
}


def test_digits_are_those_of_the_evaluation_set() -> None:
    raw = _read("digits")
    images, truth = raw["images"][raw["test/index"]], digits("test").inputs["image"]
    for image, expected in zip(images[::9], truth[::9], strict=True):
        made = make_inputs(SOURCES["digits-evaluation"], image, FLOAT)["image"]
        assert np.array_equal(made[0], expected)


def test_vowels_are_those_of_the_evaluation_set() -> None:
    raw, truth = _read("japanese-vowels"), japanese_vowels("test").inputs
    ends = np.cumsum(raw["test/lengths"].astype(int))
    series = np.split(raw["test/steps"], ends[:-1])
    for i in range(0, len(series), 7):
        made = make_inputs(SOURCES["vowels-evaluation"], series[i], FLOAT)
        assert np.abs(made["x"][0] - truth["x"][i]).max() <= MAX_ABS
        assert np.array_equal(made["padding_mask"][0], truth["padding_mask"][i])
        assert made["padding_mask"].sum() == len(series[i])
        alone = make_inputs(SOURCES["stream-evaluation"], series[i], FLOAT)
        assert list(alone) == ["x"] and np.array_equal(alone["x"], made["x"])


def test_bilinear_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    raw = np.random.default_rng(0).random((5, 7))
    step = {"op": "resize", "method": "bilinear", "size": [11, 4]}
    ours = apply_steps([step], raw)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(raw)[None, None], size=(11, 4), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    assert np.abs(ours - theirs).max() < 1e-12


def test_area_is_a_mean_over_boxes() -> None:
    raw = np.random.default_rng(0).random((12, 9))
    ours = apply_steps([{"op": "resize", "method": "area", "size": [4, 3]}], raw)
    assert np.abs(ours - raw.reshape(4, 3, 3, 3).mean((1, 3))).max() < 1e-12
    assert np.allclose(area_weights(7, 3).sum(1), 1.0) and (area_weights(7, 3) >= 0).all()
    uneven = apply_steps([{"op": "resize", "method": "area", "size": [2, 2]}], np.ones((5, 3)))
    assert np.allclose(uneven, 1.0)


def test_crop_and_pad() -> None:
    raw = np.zeros((10, 12))
    raw[2:5, 3:10] = 200
    raw[8, 1] = 40  # fainter than the threshold
    cropped = apply_steps([{"op": "crop_to_ink", "threshold": 64}], raw)
    assert cropped.shape == (3, 7) and (cropped == 200).all()
    square = apply_steps([{"op": "pad_to_square", "fill": 0}], cropped)
    assert square.shape == (7, 7) and (square[2:5] == 200).all() and square.sum() == 21 * 200
    assert apply_steps([{"op": "crop_to_ink", "threshold": 64}], raw * 0).shape == raw.shape


def test_a_drawing_is_centred_wherever_it_was_drawn() -> None:
    ink = draw_strokes(80, 80, np.random.default_rng(1))
    source = SOURCES["digits-canvas"]
    places = []
    for top, left in ((0, 0), (40, 7), (120, 100)):
        canvas = np.zeros((200, 180), np.uint8)
        canvas[top : top + 80, left : left + 80] = ink
        places.append(make_inputs(source, canvas, FLOAT)["image"])
    assert np.array_equal(places[0], places[1]) and np.array_equal(places[0], places[2])
    assert 0.2 < places[0].max() <= 1.0


@pytest.mark.parametrize("name", SOURCES)
def test_golden_samples_try_the_steps(name: str) -> None:
    source = SOURCES[name]
    samples = golden_samples(source)
    assert len(samples) >= 3
    made = [make_inputs(source, raw, FLOAT) for raw in samples.values()]
    for name, first in made[0].items():
        assert {m[name].shape for m in made} == {first.shape} and first.dtype == np.float32
        assert any(not np.array_equal(first, m[name]) for m in made[1:]), "a constant would pass"
    again = golden_samples(source)
    assert all(np.array_equal(samples[n], again[n]) for n in samples)


def test_a_wrong_step_shows() -> None:
    """Negative control: the goldens tell nearest, corners aligned and a lost scale apart."""
    source = SOURCES["digits-evaluation"]
    raw = next(iter(golden_samples(source).values()))
    truth = make_inputs(source, raw, FLOAT)["image"][0, 0]
    nearest = np.kron(raw / 16, np.ones((4, 4)))
    assert np.abs(nearest - truth).max() > 1000 * MAX_ABS
    assert np.abs(truth * 16 / 15 - truth).max() > 1000 * MAX_ABS


def test_bad_samples_and_steps_are_refused() -> None:
    source = SOURCES["vowels-evaluation"]
    with pytest.raises(InputError, match="30 rows; expected at most 29"):
        make_inputs(source, np.zeros((30, 12)), FLOAT)
    with pytest.raises(InputError, match="expected 11"):
        make_inputs(source, np.zeros((3, 11)), FLOAT)
    with pytest.raises(InputError, match="rank 3"):
        make_inputs(SOURCES["digits-canvas"], np.zeros((3, 8, 8)), FLOAT)
    with pytest.raises(UnknownNameError, match="sharpen"):
        apply_steps([{"op": "sharpen"}], np.zeros((2, 2)))
    with pytest.raises(UnknownNameError, match="cubic"):
        apply_steps([{"op": "resize", "method": "cubic", "size": [2, 2]}], np.zeros((2, 2)))
    with pytest.raises(InputError, match="reshape"):
        apply_steps([{"op": "reshape", "shape": [5]}], np.zeros((2, 2)))
