"""The platform on AWS and in its cluster, as Pulumi components: one module for each, composed by `platform/__main__.py`."""
