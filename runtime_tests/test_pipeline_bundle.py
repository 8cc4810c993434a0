"""The output folder: complete or not there, and nothing of anybody else's lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from way_tools import names

from flowexport.bundle import MANIFEST, MANIFEST_SCHEMA, Bundle, Staging, output_errors, write_json
from flowexport.core.errors import BundleError, OutputError


def write_bundle(folder: Path, mark: str) -> None:
    document = {"schema": MANIFEST_SCHEMA, "targets": {}, "mark": mark}
    (folder / MANIFEST).write_text(json.dumps(document))


def mark_of(folder: Path) -> str:
    return str(Bundle.open(folder).manifest["mark"])


def test_commit_moves_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with Staging(out) as staging:
        assert not out.exists()
        assert names(out.parent) == {f".out.partial-{os.getpid()}", ".out.lock"}
        write_bundle(staging.path, "new")
        staging.commit()
    assert mark_of(out) == "new"
    assert names(out.parent) == {"out"}


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out") as staging:
        (staging.path / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_bundle(out, "old")
    with pytest.raises(OutputError, match="exists already") as caught, Staging(out):
        pass
    assert "--force" in str(caught.value.fix) and mark_of(out) == "old"
    assert names(tmp_path) == {"out"}


def test_force_replaces_only_when_the_new_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_bundle(out, "old")
    with pytest.raises(RuntimeError), Staging(out, force=True) as staging:
        write_bundle(staging.path, "half")
        raise RuntimeError
    assert mark_of(out) == "old"
    with Staging(out, force=True) as staging:
        write_bundle(staging.path, "new")
        assert mark_of(out) == "old"
        staging.commit()
    assert mark_of(out) == "new" and names(tmp_path) == {"out"}


def test_force_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="no bundle"), Staging(tmp_path, force=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Staging(out) as staging:
        write_bundle(staging.path, "new")
        staging.commit()
    assert mark_of(out) == "new"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"), Staging(tmp_path / "out", force=True):
        pass
    with pytest.raises(OutputError, match="no folder"), Staging(tmp_path / "out" / "deeper"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_a_second_conversion_is_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out) as first:
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), Staging(out):
            pass
        assert first.path.is_dir(), "the first one goes on"
        with Staging(tmp_path / "other"):
            pass
    with Staging(out):
        pass


def test_what_a_killed_conversion_left_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-999999").mkdir()
    (tmp_path / ".out.lock").write_text("999999")
    (tmp_path / ".out2.partial-999999").mkdir()
    with Staging(tmp_path / "out") as staging:
        write_bundle(staging.path, "new")
        staging.commit()
    assert names(tmp_path) == {"out", ".out2.partial-999999"}


def test_killed_between_the_two_renames_the_old_bundle_comes_back(tmp_path: Path) -> None:
    old = tmp_path / ".out.old-999999"
    old.mkdir()
    write_bundle(old, "old")
    with (
        pytest.raises(OutputError, match="exists already"),
        Staging(tmp_path / "out"),
    ):
        pass
    assert mark_of(tmp_path / "out") == "old"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")],
)
def test_the_systems_refusals_are_said_in_words(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(OutputError, match=words), output_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_an_error_that_is_no_refusal_stays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_errors(tmp_path):
        (tmp_path / "none").read_text()


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == {"a.json"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ("[]", "schema"),
        ('{"schema": "flowexport.manifest/9", "targets": {}}', "flowexport.manifest/9"),
        ('{"schema": "flowexport.manifest/1"}', "incomplete"),
        ('{"schema": "flowexport.manifest/1", "targets": {"onnx": {}}}', "incomplete"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match=words):
        Bundle.open(tmp_path)


def test_a_path_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    entry = {
        "target": "onnx", "path": "../../etc/passwd", "sha256": "0", "size_bytes": 1,
        "precision": "fp32", "model": "m", "recipe_sha256": "0", "form": "f",
        "inputs": [], "outputs": [],
    }  # fmt: skip
    document = {"schema": MANIFEST_SCHEMA, "targets": {"onnx": entry}}
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="inside the bundle"):
        Bundle.open(tmp_path)
