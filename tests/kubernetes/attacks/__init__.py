"""What hostile code may try from inside an evaluation: each attack a small function of the standard library alone.

An attack returns how its success showed, or raises how it failed. The same functions run in an evaluation, where every one must
fail, and in a Pod that lacks the defence in question, where every one must work: an attack that works nowhere proves nothing.
`program` (in `tests/support/isolation.py`) makes one file of a module here and of `trying`, which an evaluation can run.
"""
