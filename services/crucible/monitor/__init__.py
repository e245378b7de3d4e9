"""The service that watches Jobs and Pods, and tells storage what becomes of them."""
