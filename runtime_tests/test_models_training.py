"""Shipped weights are what their cards say; training repeats from its seed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flowexport_models import DATASETS, MODELS, load_weights
from flowexport_models.train import TASKS, count_correct, shift_rotate, train

from flowexport.core.hashing import sha256_file

GOALS = {"japanese-vowels": 0.989, "japanese-vowels-causal": 0.95, "digits": 0.98}


@pytest.mark.parametrize("name", TASKS)
def test_shipped_weights_reach_what_their_card_says(name: str) -> None:
    task = TASKS[name]
    spec = MODELS[task.model]
    assert spec.weights is not None and spec.dataset == task.test
    card = json.loads(spec.weights.with_suffix(".json").read_text())
    assert card["sha256"] == sha256_file(spec.weights)
    assert spec.weights.stat().st_size == card["size_bytes"] < 3_000_000
    module = spec.build()
    load_weights(module, spec.weights)
    data = DATASETS[spec.dataset]()
    correct = count_correct(module, data)
    assert (correct, len(data)) == (card["test_correct"], card["test_samples"])
    assert correct / len(data) >= GOALS[name]
    assert card["test_accuracy"] == correct / len(data)

    text = spec.weights.with_suffix(".md").read_text()
    for fact in (
        f"{correct / len(data):.2%} ({correct} of {len(data)}",
        card["sha256"],
        card["command"],
        data.attribution,
        f"| seed | {card['seed']} |",
    ):
        assert fact in text
    # The card tells of the schedule that the command would follow today.
    assert card["training"] == json.loads(json.dumps(vars(task)))


@pytest.mark.parametrize("name", TASKS)
def test_fresh_weights_do_not_reach_it(name: str) -> None:
    torch.manual_seed(0)
    data = DATASETS[TASKS[name].test]()
    assert count_correct(MODELS[TASKS[name].model].build(), data) / len(data) < 0.5


def test_training_repeats_from_its_seed() -> None:
    task = replace(TASKS["japanese-vowels"], epochs=1)
    losses: list[float] = []
    runs = [
        train(task, seed=seed, on_epoch=lambda _, loss: losses.append(loss)).state_dict()
        for seed in (3, 3, 4)
    ]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert not all(torch.equal(runs[0][k], runs[2][k]) for k in runs[0])
    assert losses[0] == losses[1] != losses[2]


def test_augmentation_moves_images_a_little() -> None:
    torch.manual_seed(0)
    image = torch.zeros(64, 1, 32, 32)
    image[:, :, 14:18, 14:18] = 1
    (moved,) = shift_rotate(image)
    assert moved.shape == image.shape and not torch.equal(moved, image)
    rows = torch.arange(32) + 0.0
    centre = (moved.sum((1, 3)) * rows).sum(1) / moved.sum((1, 2, 3))
    assert (centre - 15.5).abs().max() <= 3
    assert centre.std() > 0.5


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowexport_models.train", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_command_writes_weights_and_card(tmp_path: Path) -> None:
    done = run("japanese-vowels", "--epochs", "1", "--seed", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out/weights/flowformer-timeseries-japanese-vowels.safetensors"
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == sha256_file(path) and card["seed"] == 5
    assert "--epochs 1" in card["command"] and card["training"]["epochs"] == 1
    assert "flowformer-timeseries-japanese-vowels" in done.stderr  # the progress bar
    assert f"{card['test_accuracy']:.2%}" in done.stdout


def test_command_refuses_bad_arguments(tmp_path: Path) -> None:
    done = run("digit", folder=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'digits'" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "file").write_text("")
    done = run("digits", "--out", "file/x", folder=tmp_path)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
