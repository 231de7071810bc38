"""A pull-through proxy for Nix binary caches that verifies what it keeps."""

__version__ = "0.1.0"
