import time

began = time.perf_counter()
total = 0
for number in range(3_000_000):
    total += number * number
print(time.perf_counter() - began)
