"""The way from the Kubernetes version that a cluster runs to a later one: `versions` has the facts, `plan` decides, `read` asks AWS, `command` tells."""
