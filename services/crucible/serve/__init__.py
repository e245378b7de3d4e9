"""Each service as a process of its own, composed from settings alone: what `crucible serve` runs, and what the images run."""
