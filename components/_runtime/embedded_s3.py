"""An S3 server inside this process, for the demo: moto, on a free port of the loopback interface.

It checks no credentials and no checksums; nothing but the demo may use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from components._runtime.s3_connection import S3Settings, connect
from defense_core.errors import ConfigError


@contextmanager
def embedded_s3(bucket: str) -> Iterator[S3Settings]:
    """Serve an empty, versioned ``bucket``; meanwhile this process and its children use that server.

    Raises:
        ConfigError: moto is not installed.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise ConfigError(
            "the demo's S3 server is not installed",
            expected="the extra demo",
            got=str(error),
            hint="pip install 'model-quarantine[demo]'",
        ) from error
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    variables = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        settings = S3Settings.from_environment()
        client = connect(settings)
        client.create_bucket(Bucket=bucket)
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        yield settings
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
