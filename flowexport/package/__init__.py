"""The package: what a demo client ships, from bundles."""

from flowexport.package.build import CLIENTS, PackageResult, make_package
from flowexport.package.read import SCHEMA, Package

__all__ = ["CLIENTS", "SCHEMA", "Package", "PackageResult", "make_package"]
