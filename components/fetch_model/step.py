"""Fetch: bytes become a checked bundle; images become a checked, pinned data folder."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from components._runtime.calibration import pool_of_bundle
from components._runtime.datasets import POOL, write_data
from components._runtime.evidence import Clock, compose
from components._runtime.licences import Licence, licence_of
from components._runtime.loading import open_images, open_model
from components._runtime.plan import Loading, Plan
from components._runtime.sources import Acquired, acquire
from defense_core.architectures import count_parameters
from defense_core.artifact_scan import ArtifactScan, require_clean, scan_artifact
from defense_core.attacks import Probe, probe_from_spec
from defense_core.bundle import Bundle, Origin, bundle_of, save_bundle
from defense_core.config import digest as config_digest
from defense_core.config import from_mapping, to_mapping
from defense_core.data import CleanSet, DataLimits, evenly_spaced, require_apart
from defense_core.evaluate import evaluate
from defense_core.files import atomic_directory
from defense_core.policy import Policy, parse_policy
from defense_core.progress import NullProgress, Progress
from defense_core.purify import method_named
from defense_core.purify.soup import SoupConfig, joined
from defense_core.scan.judgement import ScanConfig
from defense_core.scan.pool import MAX_POOL_BYTES, Pool, save_pool

TRIAL_IMAGES = 16
"""Images that a fetched model must answer with finite logits before anything else is done."""

MAX_LISTED_FILES = 20
"""Files of the artifact that the evidence lists by name; all are counted."""


def fetch_model(plan: Plan, out: Path, data: Path, *, progress: Progress = NullProgress()) -> dict[str, Any]:
    """Fetch and check everything that a run needs, before anything long is started.

    Methods, their configurations, the policy and the probes are parsed too, so that a misspelt
    key ends the run in its first seconds.

    Args:
        plan: what the run was asked to do.
        out: folder that becomes the bundle; its origin names address, version and digest.
        data: folder that becomes the run's images and probes, see :mod:`components._runtime.datasets`.

    Returns:
        Evidence ``fetch``: ``inputs`` hold the digests of source, clean set, test set,
        configuration and policy that identify the run.

    Raises:
        SourceError, ArtifactError, DataError, ConfigError, PolicyError: of the kind that fits; neither
            folder is left.
    """
    clock = Clock.start()
    policy = check_plan(plan)
    with (
        tempfile.TemporaryDirectory(prefix="quarantine-fetch-") as scratch,
        ExitStack() as made,
        atomic_directory(out) as bundle_folder,
    ):
        limits = plan.loading.limits
        acquired = acquire(
            plan.model,
            _folder(scratch, "model"),
            max_bytes=limits.max_bytes,
            sha256=plan.loading.sha256,
            progress=progress,
        )
        # Before anything of the stranger's is loaded, and on the private copy that is loaded afterwards.
        scan = scan_artifact(acquired.path, limits)
        require_clean(scan)
        licence = licence_of(plan.licence, acquired.path, acquired.companions)
        origin = Origin(acquired.uri, acquired.version_id, acquired.sha256)
        opened = open_model(acquired.path, plan.spec, plan.loading)
        # A bundle that was purified before keeps nothing of its old origin: this run fetched it from here.
        bundle = bundle_of(opened.model, opened.spec, origin)
        clean = _images(plan.clean, _folder(scratch, "clean"), bundle, progress, every_class=True)
        test = _images(plan.test, _folder(scratch, "test"), bundle, progress, every_class=False) if plan.test else None
        if test is not None:
            require_apart(clean, test, fitted_name="clean", quoted_name="test")
        _try_out(bundle, clean, _probes(plan, bundle), progress)
        pool = _pool(plan, _folder(scratch, "pool"), bundle, progress)
        digest = save_bundle(bundle, bundle_folder)
        with atomic_directory(data) as data_folder:
            write_data(data_folder, clean, test, plan.probes)
            if pool is not None:
                save_pool(pool, data_folder / POOL)
        # It is there before the bundle is, which may still fail.
        made.push(partial(_removed_on_error, data))
    return _evidence(plan, policy, clock, acquired, scan, bundle, digest, clean, test, pool, licence)


def _removed_on_error(folder: Path, kind: type[BaseException] | None, *_: object) -> bool:
    if kind is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return False


def check_plan(plan: Plan) -> Policy:
    """Parse everything in ``plan`` that can be parsed without the model; the parsed policy.

    Raises:
        ConfigError: an unknown method, or a configuration of one or of the scan with an unknown key or a bad value, or
            of a soup with other settings for a member than it runs with.
        PolicyError: a malformed policy.
    """
    for name in plan.methods:
        config = from_mapping(method_named(name).config, plan.configs.get(name, {}), where=name)
        if isinstance(config, SoupConfig):
            joined(config, {each: plan.configs.get(each, {}) for each in plan.methods if each != name})
    from_mapping(ScanConfig, plan.scan, where="scan")
    return parse_policy(plan.policy)


def _probes(plan: Plan, bundle: Bundle) -> list[Probe]:
    return [probe_from_spec(spec, num_classes=bundle.spec.num_classes) for spec in plan.probes]


def _images(uri: str, folder: Path, bundle: Bundle, progress: Progress, *, every_class: bool) -> CleanSet:
    acquired = acquire(uri, folder, max_bytes=DataLimits().max_bytes, progress=progress)
    return open_images(acquired.path, bundle, require_all_classes=every_class)


def _pool(plan: Plan, folder: Path, bundle: Bundle, progress: Progress) -> Pool | None:
    """The operator's own calibration pool, if there is one; refused here where it is of another kind of model."""
    if not plan.pool:
        return None
    acquired = acquire(plan.pool, folder, max_bytes=MAX_POOL_BYTES, progress=progress)
    settings = from_mapping(ScanConfig, plan.scan, where="scan").settings
    return pool_of_bundle(bundle, acquired.path, config_digest(settings))


def _try_out(bundle: Bundle, clean: CleanSet, probes: list[Probe], progress: Progress) -> None:
    # A set may be sorted by class, and a probe leaves images of its own class as they are.
    few = clean.subset(evenly_spaced(len(clean), TRIAL_IMAGES))
    evaluate(bundle.model, few, task=bundle.spec.task_object(), probes=probes, progress=progress)


def _asked(plan: Plan) -> dict[str, Any]:
    """Settings of the run as the operator gave them, for whoever does it again."""
    loading, usual = to_mapping(plan.loading), to_mapping(Loading())
    return {
        "device": plan.device,
        "licence": plan.licence,
        "class_names": plan.spec.get("class_names", []),
        "augment": plan.spec.get("augment"),
        "configs": plan.configs,
        "scan": plan.scan,
        "loading": {name: value for name, value in loading.items() if value != usual[name]},
    }


def _folder(scratch: str, name: str) -> Path:
    folder = Path(scratch) / name
    folder.mkdir()
    return folder


def _evidence(  # noqa: PLR0917
    plan: Plan,
    policy: Policy,
    clock: Clock,
    acquired: Acquired,
    scan: ArtifactScan,
    bundle: Bundle,
    digest: str,
    clean: CleanSet,
    test: CleanSet | None,
    pool: Pool | None,
    licence: Licence,
) -> dict[str, Any]:
    test_digest = test.digest if test is not None else None
    pool_digest = pool.digest if pool is not None else None
    identity = plan.identity(
        source=acquired.sha256, clean=clean.digest, test=test_digest, policy=policy.digest, pool=pool_digest
    )
    return compose(
        "fetch",
        clock,
        inputs={
            "source": acquired.sha256,
            "clean": clean.digest,
            "test": test_digest,
            "pool": pool_digest,
            "config": identity.config,
            "policy": identity.policy,
        },
        outputs={"model": digest},
        results={
            "uri": acquired.uri,
            "version_id": acquired.version_id,
            "registered_source": acquired.registered_source or None,
            "bytes": acquired.bytes,
            "licence": licence.licence,
            "licence_why": licence.why,
            "licence_claims": list(licence.claims),
            "formats": sorted({file.kind for file in scan.files}),
            "artifact_scan": scan.to_mapping(max_files=MAX_LISTED_FILES),
            "identity": identity.digest,
            "architecture": {"name": bundle.spec.architecture, "args": dict(bundle.spec.architecture_args)},
            "input_size": list(bundle.spec.input_size),
            "mean": list(bundle.spec.mean),
            "std": list(bundle.spec.std),
            "num_classes": bundle.spec.num_classes,
            "class_names": list(bundle.spec.class_names),
            "parameters": count_parameters(bundle.model),
            "clean_images": len(clean.distinct),
            "clean_class_counts": list(clean.without_copies().class_counts),
            "test_images": len(test.distinct) if test is not None else None,
            "methods": list(plan.methods),
            "probes": [str(spec.get("name", spec.get("kind"))) for spec in plan.probes],
            "policy": policy.name,
            "positive_control": policy.require.positive_control,
            "asked": _asked(plan),
        },
        seed=plan.seed,
    )
