"""The package: what a demo client ships."""
