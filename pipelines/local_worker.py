"""The process that runs the pipeline on this machine: ``python -m pipelines.local_worker REQUEST.json``.

kfp.local keeps its configuration and its logging in globals, prints what the steps print, and cannot be
stopped from outside. In a process group of its own none of that touches the caller.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from kfp import local


def main(request: Path) -> int:
    """Run the request's ``pipeline`` with its ``arguments`` below its ``root``.

    Returns:
        Always 0 once kfp has come back: it calls failed runs FINAL too, so the caller reads the
        run's records instead.
    """
    asked = json.loads(request.read_text("utf-8"))
    # The runner asks for an image with "python" in its name, and never uses it.
    warnings.simplefilter("ignore", category=RuntimeWarning)
    warnings.simplefilter("ignore", category=FutureWarning)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=asked["root"],
        workspace_root=asked["workspace"],
        raise_on_error=False,
    )
    from pipelines.promote import promote
    from pipelines.quarantine import quarantine

    pipelines = {"quarantine": quarantine, "promote": promote}
    pipelines[asked["pipeline"]](**asked["arguments"])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
