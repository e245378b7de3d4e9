import os
import time

began = time.perf_counter()
for _ in range(50_000):
    os.getppid()
print(time.perf_counter() - began)
