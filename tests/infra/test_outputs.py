"""The buckets: closed, encrypted, and emptied in time; and the storage service, which may do what it does and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pulumi
import pytest
from pydantic import ValidationError

from crucible_platform.outputs import Outputs, OutputsConfig, lifecycle, only_tls
from crucible_platform.place import Place
from crucible_platform.rehearsal import Rehearsal, Rehearsed, rehearse, unknown_properties

pytestmark = pytest.mark.unit

ACCOUNT = "111111111111"
BUCKETS = ("outputs", "backups", "access-logs")
BUCKET, KEY = "aws:s3/bucket:Bucket", "aws:kms/key:Key"
# As they end. The names with V2, and properties of the bucket itself that say the same, are deprecated in the provider's seventh version.
PARTS = {
    "BucketPublicAccessBlock",
    "BucketOwnershipControls",
    "BucketVersioning",
    "BucketServerSideEncryptionConfiguration",
    "BucketLifecycleConfiguration",
    "BucketPolicy",
}


def rehearsed(stack: str, config: OutputsConfig | None = None) -> Rehearsal:
    place = Place(ACCOUNT, "eu-central-1", stack)

    def program() -> None:
        outputs = Outputs(config or OutputsConfig(), place, organisation="example")
        pulumi.export("outputs_url", outputs.outputs_url)
        pulumi.export("storage_role_arn", outputs.storage_role_arn)

    return rehearse(program, stack=stack)


@pytest.fixture(scope="module")
def dev() -> Rehearsal:
    return rehearsed("dev")


def part(found: Rehearsal, kind: str, name: str) -> Rehearsed:
    return found.one(f"aws:s3/{kind[0].lower()}{kind[1:]}:{kind}", f"example-crucible-dev-{name}")


def statements(policy: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(policy)["Statement"]
    return found


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        OutputsConfig.model_validate(fields)
    [only] = caught.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


# -- buckets


def test_a_buckets_name_begins_with_what_is_unique_in_the_world(dev: Rehearsal) -> None:
    assert {each.inputs["bucket"] for each in dev.of(BUCKET)} == {f"example-crucible-dev-{name}" for name in BUCKETS}


def test_the_longest_name_is_one_that_s3_takes() -> None:
    place = Place(ACCOUNT, "eu-central-1", "production")
    found = rehearse(lambda: Outputs(OutputsConfig(), place, organisation="o" * 20), stack="production")
    assert max(len(each.inputs["bucket"]) for each in found.of(BUCKET)) <= 63


@pytest.mark.parametrize("name", BUCKETS)
def test_a_bucket_has_all_that_closes_it_and_nothing_deprecated(dev: Rehearsal, name: str) -> None:
    full = f"example-crucible-dev-{name}"
    found = {each.type.rpartition(":")[2] for each in dev.resources if each.inputs.get("bucket") == f"{full}-id"}
    assert found - {"BucketLogging"} == PARTS
    assert dev.one(BUCKET, full).inputs == {"bucket": full}


@pytest.mark.parametrize("name", BUCKETS)
def test_nobody_can_make_a_bucket_public(dev: Rehearsal, name: str) -> None:
    block = part(dev, "BucketPublicAccessBlock", name).inputs
    assert {key: value for key, value in block.items() if key != "bucket"} == {
        "blockPublicAcls": True,
        "blockPublicPolicy": True,
        "ignorePublicAcls": True,
        "restrictPublicBuckets": True,
    }
    owner = part(dev, "BucketOwnershipControls", name).inputs["rule"]
    assert owner == {"objectOwnership": "BucketOwnerEnforced"}


@pytest.mark.parametrize("name", ["outputs", "backups"])
def test_what_is_kept_is_encrypted_under_a_key_of_its_own(dev: Rehearsal, name: str) -> None:
    [rule] = part(dev, "BucketServerSideEncryptionConfiguration", name).inputs["rules"]
    default = rule["applyServerSideEncryptionByDefault"]
    assert default["sseAlgorithm"] == "aws:kms"
    assert default["kmsMasterKeyId"].endswith(f"/crucible-dev-{name}")
    assert rule["bucketKeyEnabled"] is True
    assert dev.one(KEY, f"crucible-dev-{name}").inputs["enableKeyRotation"] is True


def test_access_logs_are_encrypted_in_the_one_way_in_which_s3_delivers_them(dev: Rehearsal) -> None:
    [rule] = part(dev, "BucketServerSideEncryptionConfiguration", "access-logs").inputs["rules"]
    assert rule == {"applyServerSideEncryptionByDefault": {"sseAlgorithm": "AES256"}}


@pytest.mark.parametrize("name", BUCKETS)
def test_what_was_deleted_can_be_brought_back_for_a_while(dev: Rehearsal, name: str) -> None:
    versioning = part(dev, "BucketVersioning", name)
    assert versioning.inputs["versioningConfiguration"] == {"status": "Enabled"}
    rules = part(dev, "BucketLifecycleConfiguration", name)
    assert versioning.urn in rules.depends_on
    assert rules.inputs["rules"][0]["noncurrentVersionExpiration"] == {"noncurrentDays": 7}


@pytest.mark.parametrize("name", BUCKETS)
def test_nobody_comes_to_a_bucket_without_tls_or_with_an_old_one(dev: Rehearsal, name: str) -> None:
    full = f"example-crucible-dev-{name}"
    denied = [each for each in statements(part(dev, "BucketPolicy", name).inputs["policy"]) if each["Effect"] == "Deny"]
    assert denied == only_tls(full)
    assert [each["Condition"] for each in denied] == [
        {"Bool": {"aws:SecureTransport": "false"}},
        {"NumericLessThan": {"s3:TlsVersion": "1.2"}},
    ]
    for each in denied:
        assert (each["Principal"], each["Action"]) == ("*", "s3:*")
        assert each["Resource"] == [f"arn:aws:s3:::{full}", f"arn:aws:s3:::{full}/*"]


def test_a_buckets_policy_lets_nobody_in_but_s3_itself_with_the_logs_of_the_two_others(dev: Rehearsal) -> None:
    allowed = {
        name: [
            each for each in statements(part(dev, "BucketPolicy", name).inputs["policy"]) if each["Effect"] != "Deny"
        ]
        for name in BUCKETS
    }
    assert (allowed["outputs"], allowed["backups"]) == ([], [])
    [delivery] = allowed["access-logs"]
    assert delivery["Principal"] == {"Service": "logging.s3.amazonaws.com"}
    assert delivery["Action"] == "s3:PutObject"
    assert delivery["Resource"] == "arn:aws:s3:::example-crucible-dev-access-logs/*"
    assert delivery["Condition"] == {
        "StringEquals": {"aws:SourceAccount": ACCOUNT},
        "ArnEquals": {
            "aws:SourceArn": ["arn:aws:s3:::example-crucible-dev-outputs", "arn:aws:s3:::example-crucible-dev-backups"]
        },
    }


def test_every_access_is_written_down_but_those_to_the_log_itself(dev: Rehearsal) -> None:
    logging = dev.of("aws:s3/bucketLogging:BucketLogging")
    assert {(each.inputs["bucket"], each.inputs["targetBucket"], each.inputs["targetPrefix"]) for each in logging} == {
        (f"example-crucible-dev-{name}-id", "example-crucible-dev-access-logs-id", f"{name}/")
        for name in ("outputs", "backups")
    }
    # Before S3 may deliver them it would drop them.
    policy = part(dev, "BucketPolicy", "access-logs").urn
    assert all(policy in each.depends_on for each in logging)


def test_a_buckets_policy_and_its_block_are_not_changed_at_once(dev: Rehearsal) -> None:
    for name in BUCKETS:
        assert part(dev, "BucketPublicAccessBlock", name).urn in part(dev, "BucketPolicy", name).depends_on


def test_a_bucket_with_something_in_it_is_not_deleted_and_productions_is_by_no_mistake(dev: Rehearsal) -> None:
    production = rehearsed("production")
    for found, kept in ((dev, False), (production, True)):
        things = [*found.of(BUCKET), *found.of(KEY)]
        assert len(things) == 5
        assert [each.protected for each in things] == [kept] * 5
        assert not [each.name for each in things if each.inputs.get("forceDestroy")]


def test_the_provider_knows_every_property(dev: Rehearsal) -> None:
    assert [said for each in dev.resources if each.custom for said in unknown_properties(each)] == []


# -- what becomes of what is in them


def test_each_bucket_is_emptied_in_its_own_time() -> None:
    found = rehearsed("dev", OutputsConfig(output_days=100, backup_days=20, access_log_days=40))
    days = {
        name: part(found, "BucketLifecycleConfiguration", name).inputs["rules"][0]["expiration"]["days"]
        for name in BUCKETS
    }
    assert days == {"outputs": 100, "backups": 20, "access-logs": 40}


@pytest.mark.parametrize(
    ("days", "after", "moves"),
    [(365, 30, True), (60, 30, True), (59, 30, False), (7, 30, False), (119, 90, False), (120, 90, True)],
)
def test_it_moves_to_the_cheaper_class_if_it_stays_for_as_long_as_that_is_billed(
    days: int, after: int, moves: bool
) -> None:
    rule = lifecycle(days, OutputsConfig(infrequent_access_days=after))
    assert [(each.days, each.storage_class) for each in rule.transitions] == [(after, "STANDARD_IA")] * moves  # type: ignore[union-attr]


def test_the_rule_is_for_everything_in_the_bucket(dev: Rehearsal) -> None:
    for name in BUCKETS:
        [rule] = part(dev, "BucketLifecycleConfiguration", name).inputs["rules"]
        assert (rule["filter"], rule["status"]) == ({}, "Enabled")


def test_of_an_upload_that_nobody_finishes_nothing_stays() -> None:
    rule = lifecycle(365, OutputsConfig())
    assert rule.abort_incomplete_multipart_upload.days_after_initiation == 7  # type: ignore[union-attr]


# -- the storage service


@pytest.fixture
def rights(dev: Rehearsal) -> dict[str, dict[str, Any]]:
    """What the storage service may do, by action."""
    own = dev.one("aws:iam/rolePolicy:RolePolicy", "crucible-dev-storage")
    return {action: each for each in statements(own.inputs["policy"]) for action in each["Action"]}


def test_the_storage_service_may_do_what_it_does_and_nothing_else(rights: dict[str, dict[str, Any]]) -> None:
    assert rights.keys() == {
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:ListBucket",
        "kms:Decrypt",
        "kms:GenerateDataKey",
    }


def test_the_storage_service_reaches_outputs_and_their_key_alone(rights: dict[str, dict[str, Any]]) -> None:
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        [resource] = rights[action]["Resource"]
        assert resource.endswith("/example-crucible-dev-outputs/*")
    [bucket] = rights["s3:ListBucket"]["Resource"]
    assert bucket.endswith("/example-crucible-dev-outputs")
    for action in ("kms:Decrypt", "kms:GenerateDataKey"):
        [key] = rights[action]["Resource"]
        assert key.endswith("/crucible-dev-outputs")
        assert rights[action]["Condition"] == {"StringEquals": {"kms:ViaService": "s3.eu-central-1.amazonaws.com"}}


def test_the_storage_services_role_is_for_pods(dev: Rehearsal) -> None:
    role = dev.one("aws:iam/role:Role", "crucible-dev-storage")
    [trust] = statements(role.inputs["assumeRolePolicy"])
    assert trust["Principal"] == {"Service": "pods.eks.amazonaws.com"}
    assert not dev.of("aws:iam/rolePolicyAttachment:RolePolicyAttachment")
    assert dev.outputs["storage_role_arn"].endswith("/crucible-dev-storage")


def test_the_bucket_is_told_as_the_storage_service_has_it(dev: Rehearsal) -> None:
    assert dev.outputs["outputs_url"] == "s3://example-crucible-dev-outputs-id"


# -- configuration


def test_outputs_that_would_be_gone_before_the_cheaper_class_pays_are_refused() -> None:
    assert "infrequent_access_days 90, and S3 bills that long; keep outputs for 120 days or more" in refused(
        infrequent_access_days=90, output_days=119
    )
    assert OutputsConfig(infrequent_access_days=90, output_days=120).output_days == 120


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("infrequent_access_days", 29),
        ("output_days", 59),
        ("old_version_days", 0),
        ("backup_days", 6),
        ("access_log_days", 29),
    ],
)
def test_what_aws_does_not_take_or_nobody_can_want_is_refused(field: str, value: int) -> None:
    assert refused(**{field: value}).startswith(f"{field}: Input should be greater than or equal to {value + 1}")
