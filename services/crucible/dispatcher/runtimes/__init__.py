"""The ways to make a sandbox, one module each."""
