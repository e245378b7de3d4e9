"""Sandboxes as Jobs of a Kubernetes cluster, under gVisor: what they look like, whether there is room, and how they are asked for."""
