"""Takes evaluations from the queue and sees them through."""
