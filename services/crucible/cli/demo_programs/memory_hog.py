"""Takes memory until something stops it, and writes to every page so that none of it is only promised."""

MIB = 1024 * 1024

taken = []
while True:
    block = bytearray(4 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    taken.append(block)
