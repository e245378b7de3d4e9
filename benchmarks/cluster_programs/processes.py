import os
import time

began = time.perf_counter()
for _ in range(50):
    if os.fork() == 0:
        os._exit(0)
    os.wait()
print(time.perf_counter() - began)
