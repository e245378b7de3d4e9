"""Seeing sandboxes of a cluster through: read their output while they run, and record how each ended, once."""
