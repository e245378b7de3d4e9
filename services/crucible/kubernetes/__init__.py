"""Kubernetes as the platform uses it: the API, watches that never miss, and leases."""
