"""What model/ raises for a directory or a setting that cannot be served. It is shown to users."""

from __future__ import annotations


class ModelLoadError(ValueError):
    """The directory cannot be served; the message says why and what would help."""
