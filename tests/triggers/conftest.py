"""A PostgreSQL server for the queue's tests, where one is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """Address of a PostgreSQL server on a free port, or None where none is installed."""
    found = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None
    )
    if found is None:
        yield None
        return
    binaries, folder = Path(found).resolve().parent, tmp_path_factory.mktemp("pg")
    who = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if not any(user.pw_name == "nobody" for user in pwd.getpwall()):
            yield None
            return
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        for parent in (folder, *folder.parents):
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": folder, **who}
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "queue", "-A", "trust", "--no-sync"], check=True, timeout=120, **quiet
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    start = [binaries / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start"]
    subprocess.run(start, check=True, timeout=120, **quiet)
    yield f"postgresql+psycopg://queue@127.0.0.1:{port}/postgres"
    subprocess.run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=True, timeout=60, **quiet)
