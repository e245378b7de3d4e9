"""Events between processes: the Redis Stream that carries them, and the Pub/Sub channels beside it.

The table in storage is the truth. What Redis loses is told again from there; what it says twice is recognised by
(`evaluation_id`, `seq`).
"""
