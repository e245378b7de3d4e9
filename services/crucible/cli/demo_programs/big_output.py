"""Writes 5 MB whose SHA-256 is known, so that a lost, doubled or swapped byte would show."""

import sys

LINES = 100_000

for line in range(LINES):
    sys.stdout.write(f"{line:048d}\n" if line % 2 else f"{line:050d}\n")
