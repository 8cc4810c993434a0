"""Package folders whose import names differ from their paths (all else is in pyproject.toml)."""

from setuptools import find_packages, setup

RENAMED = {"flowexport_models": "models", "flowexport_recipes": "export_recipes"}
DATA = ["json", "html", "css", "js", "yaml", "safetensors", "md", "cu", "cuh", "cpp", "h", "txt"]

packages = find_packages(include=["flowexport", "flowexport.*"])
for name, folder in RENAMED.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(
    packages=packages,
    package_dir={"flowexport": "flowexport", **RENAMED},
    package_data={"": ["py.typed", *(f"**/*.{suffix}" for suffix in DATA)]},
    include_package_data=False,
)
