"""Which calibration pool a model is compared with."""

from __future__ import annotations

from pathlib import Path

from defense_core.bundle import Bundle
from defense_core.errors import ConfigError
from defense_core.scan.pool import Pool, Stratum, load_pool, pool_for


def pool_of_bundle(bundle: Bundle, path: Path | None, settings_digest: str) -> Pool | None:
    """The pool to compare with. Raises ConfigError for one that does not fit."""
    spec = bundle.spec
    stratum = Stratum(spec.architecture, spec.num_classes, spec.input_size, spec.class_names)
    if path is None:
        return pool_for(stratum, settings_digest)
    pool = load_pool(path)
    own = (stratum.architecture, stratum.num_classes, stratum.input_size)
    its = (pool.stratum.architecture, pool.stratum.num_classes, pool.stratum.input_size)
    if own != its:
        raise ConfigError(f"{path} is a pool of other models", expected=own, got=its, hint="Make one for this kind")
    if pool.settings_digest != settings_digest:
        raise ConfigError(
            f"{path} was made with other detector settings", expected=settings_digest, got=pool.settings_digest,
            hint="Calibrate again with these settings, or scan with the pool's",
        )  # fmt: skip
    return pool
