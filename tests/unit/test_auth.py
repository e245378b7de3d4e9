"""API keys: their form, their uniqueness, and that nothing but the whole key opens anything."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.auth import hash_secret, make_key, same, split_key
from crucible.contracts import Role

pytestmark = pytest.mark.unit


def test_a_new_key_splits_into_its_id_and_the_hash_of_its_secret() -> None:
    key, key_id, digest = make_key()
    assert split_key(key) == (key_id, digest)
    assert digest == hashlib.sha256(key.split("_", 2)[2].encode()).hexdigest()
    assert digest not in key


def test_keys_do_not_repeat_and_have_256_bits_of_secret() -> None:
    keys = {make_key()[0] for _ in range(1000)}
    assert len(keys) == 1000
    assert {len(key.split("_", 2)[2]) for key in keys} == {43}  # 32 bytes in base64 without padding


@pytest.mark.parametrize(
    "text",
    [
        "",
        "crk_",
        "crk_abcd1234",
        "crk_abcd1234_short",
        "crk_ABCD1234_" + "a" * 43,
        "crk_abcd1234_" + "a" * 44,
        "crk_abcd1234_" + "a" * 43 + "\n",
        " crk_abcd1234_" + "a" * 43,
        "crk_abcd123\u0664_" + "a" * 43,
        "crk_abcd1234_" + "é" * 43,
        "Bearer crk_abcd1234_" + "a" * 43,
    ],
)
def test_what_is_not_a_key_is_none(text: str) -> None:
    assert split_key(text) is None


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_breaks_the_splitting_or_comparing(text: str) -> None:
    assert split_key(text) is None
    assert same(text, text)
    assert not same(text, text + "x")


@given(st.integers(0, 42), st.sampled_from("abcXYZ09-_"))
def test_one_changed_character_gives_another_hash(place: int, letter: str) -> None:
    secret = "m" * 43
    assert hash_secret(secret[:place] + letter + secret[place + 1 :]) != hash_secret(secret)


def test_each_role_may_do_what_the_one_before_it_may() -> None:
    roles = list(Role)
    for index, role in enumerate(roles):
        assert [role.covers(other) for other in roles] == [other <= index for other in range(len(roles))]
