"""Fails with an exception that nobody catches."""

print(1 / 0)
