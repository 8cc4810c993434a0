"""Package folders whose import names differ from their paths (all else is in pyproject.toml)."""

from setuptools import find_packages, setup

RENAMED = {"flowexport_models": "models", "flowexport_recipes": "export_recipes"}

packages = find_packages(include=["flowexport", "flowexport.*"])
for name, folder in RENAMED.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(
    packages=packages,
    package_dir={"flowexport": "flowexport", **RENAMED},
    package_data={
        "": ["*.json", "*.html", "*.css", "*.js", "*.yaml", "*.safetensors", "*.md", "*.cu", "*.cuh",
             "*.cpp", "*.h", "CMakeLists.txt", "py.typed"],
    },
    include_package_data=False,
)
