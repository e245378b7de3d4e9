"""The message broker between storage and the workers: its topology as code, and how each side speaks to it.

A message is a hint and never the truth: it says that an evaluation waits, and at which priority. Losing, doubling or reordering
messages must be harmless, because the table in storage decides who runs what.
"""
