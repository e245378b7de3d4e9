"""The public HTTP service: authenticate, validate, accept, read back, stream.

It keeps nothing: what it knows beyond a request is a cache of what storage and the dispatcher said. It never touches the
database, the object store or a sandbox, and what people's code printed leaves it only as data, never as a page.
"""
