"""The version of the package, in one place: packaging, recipes, caches and exported files read it."""

__version__ = "0.2.0"
