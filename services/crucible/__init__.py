"""Crucible: run untrusted Python by the thousand, safely, in a known order, with results that explain themselves."""

__version__ = "0.1.0"
