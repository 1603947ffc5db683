"""Compile the pipelines to KFP's intermediate representation: same sources, same bytes.

``python -m pipelines.compile --out DIR`` writes it, ``--check`` compares it, as it is and for each shipped file of
node pools, with the golden copies.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defense_core.errors import EXIT_FAIL, EXIT_PASS, StorageError
from defense_core.files import write_atomic
from pipelines.node_pools import POOLS, NodePools, read_node_pools

FILE_NAME, PROMOTE_NAME = "quarantine.yaml", "promote.yaml"
ADMISSION_NAME = "admission.yaml"
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "pipelines" / "golden"

logger = logging.getLogger("quarantine")


def pipeline_of(file: str) -> tuple[str, Any]:
    """Name and definition of what is compiled into :data:`FILE_NAME` or :data:`PROMOTE_NAME`."""
    from pipelines import promote, quarantine

    return {
        FILE_NAME: (quarantine.PIPELINE_NAME, quarantine.quarantine),
        PROMOTE_NAME: (promote.PIPELINE_NAME, promote.promote),
    }[file]


def compile_pipeline(pools: NodePools | None = None, file: str = FILE_NAME) -> bytes:
    """A pipeline's YAML: with node pools, a second document says what the pods are given.

    Args:
        file: :data:`FILE_NAME`, the pipeline, or :data:`PROMOTE_NAME`, the promote run.
    """
    # kfp takes more than a second to import, and only this needs it.
    from kfp import compiler, dsl

    from pipelines.pods import compiled_for

    name, pipeline = pipeline_of(file)

    with (
        tempfile.TemporaryDirectory(prefix="quarantine-compile-") as folder,
        warnings.catch_warnings(),
        compiled_for(pools),
    ):
        warnings.simplefilter("ignore", category=FutureWarning)
        path = Path(folder) / file
        described = dsl.pipeline(name=name, description=pipeline.component_spec.description)
        compiler.Compiler().compile(described(pipeline.pipeline_func), str(path))
        return path.read_bytes()


def compiled_files(pools: NodePools | None = None) -> Mapping[str, bytes]:
    """What a cluster needs, by file name: the pipelines, and the admission policies where pools ask for them."""
    from pipelines.admission import admission_policies

    policies = admission_policies(pools) if pools is not None else b""
    pipelines = {file: compile_pipeline(pools, file) for file in (FILE_NAME, PROMOTE_NAME)}
    return {**pipelines, **({ADMISSION_NAME: policies} if policies else {})}


@dataclass(frozen=True)
class Compiled:
    """What a compilation did.

    Attributes:
        written: files, the pipeline first.
        removed: admission policies of an earlier compilation, which this one has none of.
    """

    written: tuple[Path, ...]
    removed: tuple[Path, ...] = ()


def compile_to(folder: Path, pools: NodePools | None = None) -> Compiled:
    """Write :func:`compiled_files` into ``folder``; what an earlier call left and this one does not write is removed.

    Raises:
        StorageError: a file cannot be written or removed.
    """
    files = compiled_files(pools)
    for name, content in files.items():
        write_atomic(Path(folder) / name, content)
    stale = [Path(folder) / ADMISSION_NAME] if ADMISSION_NAME not in files else []
    return Compiled(tuple(Path(folder) / name for name in files), tuple(path for path in stale if _removed(path)))


def _removed(path: Path) -> bool:
    """Whether there was a file to remove."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(
            f"cannot remove {path}", expected="a file of an earlier compilation, or none", got=error.strerror
        ) from error
    return True


def golden_pools() -> Mapping[str, NodePools | None]:
    """What golden copies are kept of, by their folder below :data:`GOLDEN`: no node pools, and each shipped file."""
    return {"": None, **{path.stem: read_node_pools(path.stem) for path in sorted(POOLS.glob("*.yaml"))}}


def drift(golden: Path = GOLDEN) -> list[str]:
    """Lines of unified diffs between the golden copies and the pipeline as it is (empty: equal)."""
    lines: list[str] = []
    for folder, pools in golden_pools().items():
        files = compiled_files(pools)
        for name in (FILE_NAME, PROMOTE_NAME, ADMISSION_NAME):
            path = golden / folder / name
            before = path.read_text("utf-8").splitlines() if path.exists() else []
            after = files.get(name, b"").decode().splitlines()
            lines += difflib.unified_diff(before, after, f"golden/{folder or '.'}/{name}", "compiled", lineterm="")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="folder to write the YAML into")
    action.add_argument("--check", action="store_true", help="compare with the golden copies")
    action.add_argument("--update", action="store_true", help="replace the golden copies")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if chosen.check:
        return _check()
    targets = {GOLDEN / name: pools for name, pools in golden_pools().items()} if chosen.update else {chosen.out: None}
    for folder, pools in targets.items():
        done = compile_to(folder, pools)
        for path in done.written:
            logger.info("wrote %s", path)
        for path in done.removed:
            logger.info("removed %s, of an earlier compilation", path)
    return EXIT_PASS


def _check() -> int:
    lines = drift()
    if lines:
        logger.error("%s", "\n".join(lines[:60]))
        logger.error(
            "the pipeline differs from %s; if that is meant, run: python -m pipelines.compile --update", GOLDEN
        )
    return EXIT_FAIL if lines else EXIT_PASS


if __name__ == "__main__":
    sys.exit(main())
