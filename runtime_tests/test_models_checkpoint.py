"""Checkpoints: every usual wrapping loads, nothing in a file runs, errors name the keys."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flowexport_models import build_model, load_checkpoint, load_weights
from safetensors.torch import load_file, save_file

from flowexport.core.errors import EXIT_USAGE, CheckpointError

SIZES: dict[str, Any] = {
    "feat_dim": 3,
    "max_len": 5,
    "num_classes": 2,
    "d_model": 8,
    "n_heads": 2,
    "num_layers": 1,
    "d_ff": 4,
}


def module(seed: int = 0, **config: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model("flowformer-timeseries", **{**SIZES, **config})


State = dict[str, torch.Tensor]
WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"state": {}, "param_groups": []}},
    "parallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "nested": lambda s: {"model": {"state_dict": s}},
    "settings": lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3, data_set="IMNET")},
}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrapped_checkpoints_load(wrapping: str, suffix: str, tmp_path: Path) -> None:
    state = module(1).state_dict()
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPPED[wrapping](state), path)
    assert same(load_checkpoint(path), state)
    other = module(2)
    assert not same(other.state_dict(), state)
    load_weights(other, path)
    assert same(other.state_dict(), state)


def test_safetensors_and_the_legacy_format_load(tmp_path: Path) -> None:
    state = module(1).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "legacy.pth"):
        assert same(load_checkpoint(tmp_path / name), state)


def test_half_precision_weights_become_the_modules(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in module(1).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    target = module(2)
    load_weights(target, tmp_path / "w.safetensors")
    assert all(p.dtype is torch.float32 for p in target.parameters())
    assert same(target.state_dict(), {k: v.float() for k, v in state.items()})


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_pickle_bomb_does_not_go_off(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "bomb.pth"
    content = {"model": module().state_dict(), "extra": Bomb(mark)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"extra": Bomb(mark)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert not mark.exists()
    if form == "bare pickle":
        assert "no PyTorch checkpoint" in str(caught.value)
    else:
        assert "execute" in str(caught.value) and "mkdir" in str(caught.value)
    # The bomb is a real one.
    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(
        path.read_bytes()
    )
    assert mark.exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_truncated_file(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    state = module().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_checkpoint(path)
    assert caught.value.exit_code == EXIT_USAGE
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_another_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_text("not weights at all\n" * 100)
    with pytest.raises(CheckpointError, match=r"truncated or no"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"epoch": 3, "loss": 0.5}, "epoch, loss"),
        ({}, "empty"),
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
    ],
)
def test_file_without_a_state_dict(content: Any, word: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=word):
        load_checkpoint(tmp_path / "w.pth")


def test_another_models_checkpoint_names_keys_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(module(num_layers=3, num_classes=4).state_dict(), path)
    target = module()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, path)
    text = str(caught.value)
    assert "FlowformerTimeSeries" in text and "missing" not in text
    assert "32 unexpected (encoder.attn_layers.1." in text and "and 27 more" in text
    assert "output_layer.weight has 4x40; expected 2x40" in text
    assert same(target.state_dict(), before)

    save_file({"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(features\.0\.weight\)") as caught:
        load_weights(target, path)
    assert f"{len(before)} missing (" in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = module().state_dict()
    state["output_layer.bias"] = torch.tensor([0.0, float("nan")])
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite in output_layer\.bias"):
        load_weights(module(), tmp_path / "w.safetensors")


def test_convolution_weights_keep_the_checkpoints_shape(tmp_path: Path) -> None:
    source = module(1)
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    assert load_file(path)["encoder.attn_layers.0.conv1.weight"].shape == (4, 8, 1)
    assert source.encoder.attn_layers[0].conv1.weight.shape == (4, 8)
