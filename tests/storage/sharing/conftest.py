"""A bucket of a real S3 server."""

from collections.abc import Iterator

import pytest

from tests.s3 import Bucket, S3Server, new_bucket


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[Bucket]:
    with new_bucket(s3) as bucket:
        yield bucket
