"""Make the shipped data files again from their sources.

pip download --no-deps aeon
python -m flowexport_models.data.prepare japanese-vowels --wheel aeon-1.6.0-py3-none-any.whl
python -m flowexport_models.data.prepare digits
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np

from flowexport.core.errors import FlowExportError, InputError

FOLDER = Path(__file__).parent
WHEEL_FOLDER = "aeon/datasets/data/JapaneseVowels"
HELD_OUT = 360
SPLIT_SEED = 0


def parse_ts(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a ``.ts`` file of the UEA archive: channels parted by ``:``, the class last.

    Returns:
        steps (sum of lengths, channels) float32, lengths (samples,) uint8,
        classes (samples,) uint8 counted from 0.

    Raises:
        InputError: there is no ``@data``, or a sample's channels differ in length.
    """
    _, found, data = text.partition("@data")
    if not found:
        raise InputError("read .ts: the file has no @data line; expected a UEA .ts file.")
    series, targets = [], []
    for number, line in enumerate(data.split(), start=1):
        *channels, target = line.split(":")
        values = [np.array(c.split(","), np.float32) for c in channels]
        if len({len(v) for v in values}) != 1:
            raise InputError(f"read .ts: sample {number} has channels of unequal lengths.")
        series.append(np.stack(values, axis=1))
        targets.append(int(target) - 1)
    lengths = np.array([len(s) for s in series], np.uint8)
    return np.concatenate(series), lengths, np.array(targets, np.uint8)


def prepare_japanese_vowels(wheel: Path, out: Path = FOLDER) -> Path:
    """Write ``japanese-vowels.safetensors`` from the aeon wheel's copy of the UEA split."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(wheel) as files:
            for split in ("train", "test"):
                name = f"{WHEEL_FOLDER}/JapaneseVowels_{split.upper()}.ts"
                steps, lengths, targets = parse_ts(files.read(name).decode())
                arrays[f"{split}/steps"] = steps
                arrays[f"{split}/lengths"] = lengths
                arrays[f"{split}/targets"] = targets
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"prepare japanese-vowels: {wheel} is no aeon wheel with {WHEEL_FOLDER}.",
            fix="pip download --no-deps aeon",
        ) from error
    path = out / "japanese-vowels.safetensors"
    save_file(arrays, path)
    return path


def prepare_digits(out: Path = FOLDER) -> Path:
    """Write ``digits.safetensors``: the images and a stratified split of fixed seed."""
    from safetensors.numpy import save_file
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)),
        test_size=HELD_OUT,
        random_state=SPLIT_SEED,
        stratify=bunch.target,
    )
    path = out / "digits.safetensors"
    save_file(
        {
            "images": bunch.images.astype(np.uint8),
            "targets": bunch.target.astype(np.uint8),
            "train/index": np.sort(train).astype(np.int16),
            "test/index": np.sort(test).astype(np.int16),
        },
        path,
    )
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flowexport_models.data.prepare")
    commands = parser.add_subparsers(dest="name", required=True)
    vowels = commands.add_parser("japanese-vowels")
    vowels.add_argument("--wheel", type=Path, required=True, help="aeon's wheel, unopened")
    commands.add_parser("digits")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.name == "digits":
            path = prepare_digits(chosen.out)
        else:
            path = prepare_japanese_vowels(chosen.wheel, chosen.out)
    except FlowExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
