"""Installs gVisor on a node and says whether sandboxes may run there: the program of the `gvisor-installer` image.

Standard library and `crucible.names` alone, since it runs with privileges on every sandbox node: what it does not import cannot
break or be broken into. What is decided (`containerd`, `readiness`) is pure; what touches the node is in `release` and `host`,
what touches the cluster in `api` and `probe`; `installer` puts them together.
"""
