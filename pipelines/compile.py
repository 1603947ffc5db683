"""Compile the pipeline to KFP's intermediate representation: same sources, same bytes.

``python -m pipelines.compile --out DIR`` writes it, ``--check`` compares it with the golden copy.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from defense_core.errors import EXIT_FAIL, EXIT_PASS
from defense_core.files import write_atomic

FILE_NAME = "quarantine.yaml"
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "pipelines" / "golden" / FILE_NAME

logger = logging.getLogger("quarantine")


def compile_pipeline() -> bytes:
    """The pipeline's YAML."""
    # kfp takes more than a second to import, and only this needs it.
    from kfp import compiler

    from pipelines.quarantine import quarantine

    with tempfile.TemporaryDirectory(prefix="quarantine-compile-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        path = Path(folder) / FILE_NAME
        compiler.Compiler().compile(quarantine, str(path))
        return path.read_bytes()


def compile_to(folder: Path) -> Path:
    """Write the YAML into ``folder``; its path. Raises StorageError."""
    path = Path(folder) / FILE_NAME
    write_atomic(path, compile_pipeline())
    return path


def drift(golden: Path = GOLDEN) -> list[str]:
    """Lines of a unified diff between the golden copy and the pipeline as it is (empty: equal)."""
    before = golden.read_text("utf-8").splitlines() if golden.exists() else []
    after = compile_pipeline().decode().splitlines()
    return list(difflib.unified_diff(before, after, "golden", "compiled", lineterm=""))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="folder to write the YAML into")
    action.add_argument("--check", action="store_true", help="compare with the golden copy")
    action.add_argument("--update", action="store_true", help="replace the golden copy")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not chosen.check:
        logger.info("wrote %s", compile_to(GOLDEN.parent if chosen.update else chosen.out))
        return EXIT_PASS
    lines = drift()
    if lines:
        logger.error("%s", "\n".join(lines[:60]))
        logger.error(
            "the pipeline differs from %s; if that is meant, run: python -m pipelines.compile --update", GOLDEN
        )
    return EXIT_FAIL if lines else EXIT_PASS


if __name__ == "__main__":
    sys.exit(main())
