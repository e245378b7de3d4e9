"""A STAND-IN for Pulumi's providers of AWS and Kubernetes, whose programs no package index serves: the real engine talks to it as to them.

It keeps what it makes in a folder, a JSON file each, so that a test sees what is there and may change it behind the engine's back. It knows which
properties are fixed at creation, as far as tests use it, and can be told to fail at a resource. It knows nothing of either: whether AWS or a cluster would
accept a value is not shown by any test that uses it.
"""
