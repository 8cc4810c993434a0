"""The architecture's import direction, and lazy SDKs, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Part of the tree -> the parts that it may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "ops": {"core"},
    "lowering": {"core", "ops"},
    "targets": {"core", "ops", "lowering"},
    "parity": {"core"},
    "bench": {"core"},
    "report": {"core"},
    "package": {"core", "parity", "report", "<top>"},
    "devices": {"core", "parity", "bench", "report", "package", "<top>"},
    "demo": {"core", "package"},
    "baseline": {"core", "ops", "lowering", "parity", "bench", "recipes", "registry", "<top>"},
    "recipes": {"core"},
    "registry": {"core", "ops"},
    "runners": {"core"},
    "models": {"core", "ops"},
}
# The pipeline's level sees all of them; the CLI sees the pipeline's level too.
EVERYTHING = {*ALLOWED, "cli", "<top>"}
# A target may build on another's file format: TensorRT reads the ONNX file.
TARGET_USES = {"tensorrt": {"onnx"}}

SDKS = {
    "onnx", "onnxruntime", "onnxscript", "onnxsim", "onnx_ir", "coremltools", "litert_torch",
    "ai_edge_litert", "ai_edge_quantizer", "tensorrt", "tensorrt_rtx", "sklearn", "matplotlib",
    "aeon", "jax", "transformers", "triton",
}  # fmt: skip
TORCH_AT_TOP = {"ops", "lowering", "targets", "models"}


def source_files() -> list[Path]:
    return sorted([*(ROOT / "flowexport").rglob("*.py"), *(ROOT / "models").rglob("*.py")])


def part_of(module: str) -> str:
    """Return the part of the tree that a dotted module name belongs to."""
    names = module.split(".")
    if names[0] == "flowexport_models":
        return "models"
    if len(names) == 1:
        return "<top>"
    return names[1] if (ROOT / "flowexport" / names[1]).is_dir() or names[1] in ALLOWED else "<top>"


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    names = list(relative.parts)
    if names[0] == "models":
        names[0] = "flowexport_models"
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path, *, top_level_only: bool) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST]
    if top_level_only:
        nodes, stack = [], list(tree.body)
        while stack:
            node = stack.pop()
            nodes.append(node)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
                stack += [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt)]
    else:
        nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = module_name(path)
    part = part_of(own)
    allowed = EVERYTHING if part in ("<top>", "cli") else ALLOWED[part] | {part}
    wrong = []
    for line, name in imports(path, top_level_only=False):
        if (
            not name.startswith(("flowexport.", "flowexport_models"))
            or name == "flowexport.__version__"
        ):
            continue
        if part_of(name) not in allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        if part == "targets" and name.startswith("flowexport.targets."):
            here, there = own.split(".")[2:3], name.split(".")[2]
            if here and there not in {here[0], *TARGET_USES.get(here[0], set())}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports another target: {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_sdks_are_imported_when_used(path: Path) -> None:
    part = part_of(module_name(path))
    forbidden = SDKS if part in TORCH_AT_TOP else SDKS | {"torch"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name} at module level"
        for line, name in imports(path, top_level_only=True)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_this_test_sees_the_tree() -> None:
    parts = {part_of(module_name(p)) for p in source_files()}
    assert {"core", "ops", "lowering", "targets", "models", "cli", "<top>"} <= parts
    assert part_of("flowexport.core.types.Artifact") == "core"
    assert part_of("flowexport.pipeline.convert") == "<top>"
