import os
import time

began = time.perf_counter()
for number in range(200):
    with open(f"/tmp/{number}", "wb") as file:
        file.write(bytes(65536))
for number in range(200):
    with open(f"/tmp/{number}", "rb") as file:
        file.read()
    os.unlink(f"/tmp/{number}")
print(time.perf_counter() - began)
