"""One image of services/images for a test, built where it is not in the cache; `tests.deployment` builds them all."""

from __future__ import annotations

from functools import cache

from tests.deployment.images import Image, build


@cache
def built_image(name: str) -> Image:
    """Build one, unless that is done already.

    Raises:
        DeployError: it cannot be built.
    """
    (image,) = build((name,))
    return image
