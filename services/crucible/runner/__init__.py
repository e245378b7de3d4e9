"""What runs inside the sandbox around the code; the standard library alone."""
