"""The platform of this checkout on a cluster: what `make deploy` does, for people and for the tests that need all of it.

The same steps for a test cluster, for kind and for any cluster that KUBECONFIG names; only how images get there differs. Nothing is
remembered on this machine: what was made before is found in the cluster, so every step may be done again.
"""

from tests.deployment.deploy import Deployed, deploy, find_deployed, make_secrets, remove
from tests.deployment.errors import DeployError
from tests.deployment.images import Image, build
from tests.deployment.target import Target, find_target

__all__ = [
    "DeployError",
    "Deployed",
    "Image",
    "Target",
    "build",
    "deploy",
    "find_deployed",
    "find_target",
    "make_secrets",
    "remove",
]
