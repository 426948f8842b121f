"""What SageMaker's and Bedrock's exports share: where the model will lie, the role, the region, and who has the images there."""

from __future__ import annotations

import re

from gptoss_convert.convert.exports.package import Request
from gptoss_convert.errors import UsageError

# What stands in the requests where nothing was given. Valid to every validator, so that the rest can be checked; deploy.py and a
# person replace them.
PLACE_BUCKET = "replace-this-bucket"
PLACE_ROLE = "arn:aws:iam::000000000000:role/replace-this-role"
DEFAULT_REGION = "us-east-1"

# Patterns of botocore 1.44.5's shapes (RoleArn, Bedrock's S3Uri), read 2026-11-22; S3's own rule for a bucket's name.
_ROLE = r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[a-zA-Z_0-9+=,.@\-_/]+"
_PLACE = r"s3://([a-z0-9][-.a-z0-9]{1,61}[a-z0-9])((?:/[-!_*'().a-z0-9A-Z]+)*)/?"
_REGION = r"[a-z]{2}(-[a-z]+)+-[0-9]"

# Who owns the deep learning images of a region. Read 2026-11-22 in aws/sagemaker-python-sdk, image_uri_config/vllm.json and
# vllm-server.json (registries). China, GovCloud and the isolated partitions have other address endings: there, --image.
REGISTRY = "763104351884"
REGISTRIES = {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360",
    "ap-south-2": "772153158452",
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "eu-central-2": "380420809688",
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "mx-central-1": "637423239942",
}
REGIONS = {
    *REGISTRIES, "ap-northeast-1", "ap-northeast-2", "ap-south-1", "ap-southeast-1", "ap-southeast-2", "ca-central-1",
    "eu-central-1", "eu-north-1", "eu-west-1", "eu-west-2", "eu-west-3", "sa-east-1", "us-east-1", "us-east-2",
    "us-west-1", "us-west-2",
}  # fmt: skip


def model_uri(request: Request, name: str) -> str:
    """s3://bucket/prefix/ where the model will lie, from --bucket; of a bucket alone, a folder of the model's name."""
    if request.bucket is None:
        return f"s3://{PLACE_BUCKET}/{name}/"
    found = re.fullmatch(_PLACE, request.bucket)
    if found is None:
        raise UsageError("not a place in S3", found=request.bucket, expected="s3://BUCKET or s3://BUCKET/PREFIX")
    return f"s3://{found[1]}{found[2] or '/' + name}/"


def role_arn(request: Request) -> str:
    """The execution role, or what stands for it."""
    if request.role is not None and not re.fullmatch(_ROLE, request.role):
        raise UsageError("not an IAM role's ARN", found=request.role, expected="arn:aws:iam::123456789012:role/NAME")
    return request.role or PLACE_ROLE


def region_of(request: Request) -> str:
    """The region, us-east-1 where none was given."""
    if request.region is not None and not re.fullmatch(_REGION, request.region):
        raise UsageError("not a region of AWS", found=request.region, expected="such as us-east-1")
    return request.region or DEFAULT_REGION


def region_of_image(image: str) -> str | None:
    """The region of an image in ECR; None of another registry, or of the public one."""
    found = re.search(r"\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.", image)
    return found[1] if found else None


def deep_learning_image(region: str, name: str) -> str:
    """The address of one of AWS's own images in a region."""
    if region not in REGIONS:
        raise UsageError(
            "whose images this region has is not listed here", found=region, expected=", ".join(sorted(REGIONS)),
            remedy="give the whole address: --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/REPOSITORY:TAG",
        )  # fmt: skip
    return f"{REGISTRIES.get(region, REGISTRY)}.dkr.ecr.{region}.amazonaws.com/{name}"


def is_placeholder(value: str) -> bool:
    """Whether a value stands for one that was not given."""
    return value == PLACE_ROLE or value.startswith(f"s3://{PLACE_BUCKET}/")


def to_do(uri: str, role: str) -> str | None:
    """A note on what is still to be filled in."""
    left = [what for what, value in (("the bucket", uri), ("the role", role)) if is_placeholder(value)]
    return f"{' and '.join(left)} in the requests must be replaced: --bucket, --role" if left else None
