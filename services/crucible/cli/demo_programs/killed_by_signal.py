"""Dies of a signal, as a crashing extension module would."""

import signal

signal.raise_signal(signal.SIGSEGV)
