"""Would sleep for a minute; is cancelled while it does."""

import time

print("sleeping", flush=True)
time.sleep(60)
