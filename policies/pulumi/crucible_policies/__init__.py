"""The rules of the policy pack, pure: what a resource must be like before Pulumi may make it. `rules.RULES` has them all.

It imports nothing but the standard library, so that it runs in the pack's own environment and in the tests' alike.
"""
