"""What the cluster's dispatcher refuses before it asks a cluster; what it does with one is shown in tests/kubernetes."""

from __future__ import annotations

import pytest

from crucible.dispatcher.kubernetes.dispatcher import check_images, check_limits
from crucible.limits import Limits
from crucible.quantity import MIB
from crucible.settings import SettingsError

pytestmark = pytest.mark.unit

DIGEST = "sha256:" + "a" * 64


def test_images_by_digest_that_cover_what_a_request_may_name_are_taken() -> None:
    check_images({"python": f"registry:5000/a/b@{DIGEST}", "more": f"c:tag@{DIGEST}"}, ("python",))


@pytest.mark.parametrize(
    ("reference", "word"),
    [
        (None, "CRUCIBLE_KUBERNETES__IMAGES: lacks python, which CRUCIBLE_LIMITS__IMAGES allows"),
        ("registry/runner", "python must name its image by digest"),
        ("registry/runner:latest", "by digest"),
        ("registry/runner@sha256:abc", "by digest"),
        (f"registry/runner@{DIGEST}\nx", "by digest"),
        (f"@{DIGEST}", "by digest"),
    ],
)
def test_an_image_that_could_be_moved_is_refused_by_name(reference: str | None, word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        check_images({"python": reference} if reference else {}, ("python",))


def test_code_that_no_config_map_holds_is_refused_at_the_start() -> None:
    check_limits(Limits())
    with pytest.raises(SettingsError, match="CRUCIBLE_LIMITS__STDIN_BYTES: at most 1048576"):
        check_limits(Limits(stdin_bytes=MIB + 1))
