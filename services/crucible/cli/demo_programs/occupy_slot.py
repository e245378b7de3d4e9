"""Holds its slot for a moment, so that what comes after it has to queue."""

import time

time.sleep(1.2)
print("the slot is free again")
