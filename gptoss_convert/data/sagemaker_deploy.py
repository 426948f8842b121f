#!/usr/bin/env python3
"""Upload the model that lies beside this file to S3 and make its SageMaker endpoint from the requests beside it.

    python deploy.py --bucket s3://BUCKET/PREFIX --role arn:aws:iam::123456789012:role/NAME --region us-east-1

May be run again: a file that is there with its digest is not uploaded again, and what exists as asked is left alone. Needs boto3
and credentials, from the environment or ~/.aws. Endpoints cost money by the hour until they are deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, WaiterError

HERE = Path(__file__).resolve().parent
ARCHIVE = "model.tar.gz"
PLACEHOLDER = "replace-this"
CREATED = (("model", "Model"), ("endpoint_config", "EndpointConfig"), ("endpoint", "Endpoint"))


class Problem(Exception):
    """Something that the person can mend; shown without a traceback."""


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(given)
    try:
        requests = filled(options)
        region = region_of(requests, options.region)
        if not options.dry_run:
            upload(boto3.client("s3", region_name=region), requests)
            create(boto3.client("sagemaker", region_name=region), requests, wait=not options.no_wait)
    except (Problem, BotoCoreError, Boto3Error, ClientError, OSError) as error:
        print(f"deploy.py: {error}", file=sys.stderr)
        return 1
    return 0


def parse(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bucket", metavar="s3://BUCKET/PREFIX", help="where the model will lie, a prefix of its own")
    parser.add_argument("--role", metavar="ARN", help="the role that SageMaker takes on")
    parser.add_argument("--region", help="default: the one of the image")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the endpoint is in service")
    parser.add_argument("--dry-run", action="store_true", help="check the requests and call nothing")
    return parser.parse_args(given)


def filled(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The three requests with bucket and role put in; Problem while a placeholder is left."""
    requests = {kind: request_of(kind, shape) for kind, shape in CREATED}
    model = requests["model"]
    if options.role:
        model["ExecutionRoleArn"] = options.role
    if options.bucket:
        if not re.fullmatch(r"s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](/[^/]+)+/?", options.bucket):
            raise Problem(f"--bucket {options.bucket}: expected s3://BUCKET/PREFIX")
        place = options.bucket.rstrip("/") + "/"
        data_source(requests)["S3Uri"] = place + (ARCHIVE if archived(requests) else "")
    for what, value in (("--bucket", data_source(requests)["S3Uri"]), ("--role", model["ExecutionRoleArn"])):
        if PLACEHOLDER in value:
            raise Problem(f"{value} stands for a value of yours: give {what}")
    return requests


def request_of(kind: str, shape: str) -> dict[str, Any]:
    """A request as it lies beside this file; Problem where an edit has spoilt it."""
    path = HERE / f"create_{kind}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Problem(f"{path.name} is not JSON: {error}") from error
    try:
        wanted = [found[f"{shape}Name"]]
        if kind == "model":
            source = found["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
            wanted += [
                found["PrimaryContainer"]["Image"],
                found["ExecutionRoleArn"],
                source["S3Uri"],
                source["CompressionType"],
            ]
    except (KeyError, TypeError) as error:
        raise Problem(f"{path.name} lacks a part that is needed: {error}") from error
    if not all(isinstance(value, str) for value in wanted):
        raise Problem(f"{path.name}: names, image, role and place must be text")
    return dict(found)


def data_source(requests: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Where the model's container takes its data from."""
    source: dict[str, str] = requests["model"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    return source


def archived(requests: dict[str, dict[str, Any]]) -> bool:
    """Whether the model is one model.tar.gz."""
    return data_source(requests)["CompressionType"] == "Gzip"


def region_of(requests: dict[str, dict[str, Any]], asked: str | None) -> str:
    """The image's region, which is the endpoint's; Problem when another was asked for."""
    image = requests["model"]["PrimaryContainer"]["Image"]
    found = re.search(r"\.dkr\.ecr\.([a-z0-9-]+)\.", image)
    if asked and found and asked != found[1]:
        raise Problem(
            f"the image lies in {found[1]}, the endpoint would in {asked}: export again with --region {asked}"
        )
    region = asked or (found[1] if found else None)
    if region is None:
        raise Problem(f"the image {image} names no region: give --region")
    return region


def digests() -> dict[str, str]:
    """SHA-256 by name, as the export has listed them."""
    lines = (HERE / "SHA256SUMS").read_text(encoding="utf-8").split("\n")[:-1]
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def upload(s3: Any, requests: dict[str, dict[str, Any]]) -> None:
    """Bring the model's files to their place in S3; Problem if the prefix holds anything else, for SageMaker takes all of it."""
    bucket, _, prefix = data_source(requests)["S3Uri"].removeprefix("s3://").partition("/")
    listed = digests()
    if archived(requests):
        files = {prefix: ARCHIVE}
    else:
        files = {prefix + name.removeprefix("model/"): name for name in listed if name.startswith("model/")}
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        strange = [item["Key"] for page in pages for item in page.get("Contents", []) if item["Key"] not in files]
        if strange:
            raise Problem(
                f"s3://{bucket}/{prefix} holds {len(strange)} objects that are not of this model, such as {strange[0]}: "
                "choose an empty prefix, or remove them"
            )
    for key, name in sorted(files.items()):
        path, digest = HERE / name, listed[name]
        if there(s3, bucket, key, path.stat().st_size, digest):
            print(f"there already  {key}")
            continue
        if sha256_of(path) != digest:
            raise Problem(f"{name} is not as it was exported (SHA256SUMS): export again")
        print(f"uploading      {key}")
        s3.upload_file(str(path), bucket, key, ExtraArgs={"Metadata": {"sha256": digest}})


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def there(s3: Any, bucket: str, key: str, size: int, digest: str) -> bool:
    """Whether an object is there with this size and the digest that an earlier run has written to it.

    Problem where it has another digest: an endpoint may have been made of it, and would load the new file at its next start.
    """
    try:
        found = s3.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            return False
        raise
    earlier = found["Metadata"].get("sha256")
    if earlier not in (None, digest):
        raise Problem(f"s3://{bucket}/{key} is of another export: choose another prefix and --name, or remove it")
    return bool(found["ContentLength"] == size and earlier == digest)


def create(sagemaker: Any, requests: dict[str, dict[str, Any]], *, wait: bool) -> None:
    """Model, configuration and endpoint, each unless it exists as asked; Problem where another has its name."""
    for kind, shape in CREATED:
        request = requests[kind]
        name = request[f"{shape}Name"]
        found = described(getattr(sagemaker, f"describe_{kind}"), {f"{shape}Name": name})
        if found is None:
            getattr(sagemaker, f"create_{kind}")(**request)
            print(f"created        {kind} {name}")
        elif difference := differs(request, found):
            raise Problem(
                f"another {kind} is called {name}: its {difference}. Delete it, or export with another --name"
            )
        else:
            print(f"there already  {kind} {name}")
    name = requests["endpoint"]["EndpointName"]
    if wait:
        print(f"waiting        until {name} is in service; this takes minutes")
        try:
            sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=name)
        except WaiterError as error:
            reason = sagemaker.describe_endpoint(EndpointName=name).get("FailureReason", error)
            raise Problem(f"endpoint {name} did not come into service: {reason}") from error
    print(f"endpoint       {name}: {sagemaker.describe_endpoint(EndpointName=name)['EndpointStatus']}")


def described(describe: Any, name: dict[str, str]) -> dict[str, Any] | None:
    """What exists under a name, or None."""
    try:
        found: dict[str, Any] = describe(**name)
    except ClientError as error:
        problem = error.response["Error"]
        if problem["Code"] in ("ValidationException", "ResourceNotFound") and "ould not find" in problem["Message"]:
            return None
        raise
    return found


def differs(asked: Any, found: Any, where: str = "") -> str | None:
    """Where what exists is not what is asked for; SageMaker adds keys of its own, which do not count."""
    if isinstance(asked, dict) and isinstance(found, dict):
        pairs = ((f"{where}.{key}".lstrip("."), value, found.get(key)) for key, value in asked.items())
    elif isinstance(asked, list) and isinstance(found, list) and len(asked) == len(found):
        pairs = ((f"{where}[{i}]", a, f) for i, (a, f) in enumerate(zip(asked, found, strict=True)))
    else:
        return None if asked == found else f"{where} is {found!r}, not {asked!r}"
    return next((text for place, a, f in pairs if (text := differs(a, f, place))), None)


if __name__ == "__main__":
    sys.exit(main())
