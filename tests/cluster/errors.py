"""What can go wrong with the cluster tool, as one error whose text says what to do."""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster could not do what was asked; the text says why and, where that is known, what to do about it."""


class UnsupportedHereError(ClusterError):
    """This kind of cluster cannot do that; the text says which kind can."""
