"""Leaves with an exit code of its own choice."""

import sys

print("leaving with 3", file=sys.stderr)
sys.exit(3)
