"""The public HTTP service: authenticate, validate, accept, read back, stream."""
