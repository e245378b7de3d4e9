"""Standard input arrives whole; what it says goes back in capitals."""

import sys

print(sys.stdin.read().upper(), end="")
