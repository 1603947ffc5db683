# mypy: disable-error-code="untyped-decorator"
"""The pipeline, one definition for a laptop and a cluster.

Fetch → scan, evaluate before → for each method: purify, evaluate → mix what they made, evaluate → select → rescan,
export → gate → sign → promote → attest; report always. After a scan without findings the fetched model takes the
methods' place, unless the policy forces them, and nothing is mixed.

Parameters are strings, JSON strings, one int and one list:
see :meth:`components._runtime.plan.Plan.arguments`.
"""

from typing import Any

from kfp import dsl

from components._runtime.plan import DEFAULT_METHODS, SOUP
from components.control_model.component import control_model
from components.evaluate_model.component import evaluate_model
from components.export_onnx.component import export_onnx
from components.fetch_model.component import fetch_model
from components.gate_promotion.component import gate_promotion
from components.purify_model.component import purify_model
from components.report.component import report
from components.scan_backdoor.component import scan_backdoor
from components.select_model.component import select_model
from pipelines.tasks import publish, set_up

PIPELINE_NAME = "model-quarantine"


@dsl.pipeline(
    name=PIPELINE_NAME,
    description="Fetch a model, purify it, measure it, and promote it only if a policy allows.",
)
def quarantine(  # noqa: PLR0917 - KFP takes parameters by position
    model: str,
    clean: str,
    policy: str,
    run: str,
    test: str = "",
    pool: str = "",
    spec: str = "{}",
    probes: str = "[]",
    methods: list[str] = list(DEFAULT_METHODS),  # noqa: B006 - KFP reads the default, nothing changes it
    configs: str = "{}",
    scan: str = "{}",
    loading: str = "{}",
    licence: str = "",
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Quarantine one model.

    Args:
        model: s3://bucket/key[?versionId=...], models:/name/3, file:// or a path.
        clean: Address or path of the clean set, parquet or npz.
        policy: JSON, the policy.
        run: JSON, evidence store, registered model, alias, and the execution's name or nothing.
        test: Address or path of the test set; empty: the report split of the clean set is quoted.
        pool: Address or path of a calibration pool; empty: the one that comes along for this kind of model.
        spec: JSON, how to read a bare state dict; {} for a bundle.
        probes: JSON, a list of trigger specifications.
        methods: Names of the purifiers, in order of preference.
        configs: JSON, configuration by method.
        scan: JSON, settings of the backdoor scan.
        loading: JSON, limits, expected digest and trusted modules.
        licence: SPDX expression that is declared for the model; empty: none is.
        seed: Seed of the splits and methods.
        device: auto, cpu or cuda.
    """
    records: dict[str, Any] = {"run": run, "execution": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    shared: dict[str, Any] = {"loading": loading, "seed": seed, **records}
    last = set_up(report(**records), "report")
    with dsl.ExitHandler(last, name="quarantine-steps"):
        fetched = set_up(
            fetch_model(
                model=model,
                clean=clean,
                test=test,
                pool=pool,
                policy=policy,
                spec=spec,
                probes=probes,
                methods=methods,
                configs=configs,
                scan=scan,
                licence=licence,
                device=device,
                **shared,
            ),
            "fetch_model",
        )
        bundle, data = fetched.outputs["bundle"], fetched.outputs["data"]
        before = set_up(
            evaluate_model(bundle=bundle, data=data, name="before", device=device, **shared), "evaluate_model"
        )
        scanned = set_up(
            scan_backdoor(
                bundle=bundle,
                data=data,
                name="scan",
                scan=scan,
                policy=policy,
                methods=methods,
                device=device,
                **shared,
            ),
            "scan_backdoor",
        )
        control = set_up(
            control_model(bundle=bundle, data=data, scan=scan, policy=policy, device=device, **shared), "control_model"
        )
        # After a PASS the list is one name that stands for the model as it is: the graph is the same either way.
        with dsl.ParallelFor(scanned.outputs["Output"], name="methods") as method:
            purified = set_up(
                purify_model(bundle=bundle, data=data, method=method, configs=configs, device=device, **shared),
                "purify_model",
            )
            evaluated = set_up(
                evaluate_model(
                    bundle=purified.outputs["purified"],
                    data=data,
                    name=method,
                    reference=bundle,
                    device=device,
                    **shared,
                ),
                "evaluate_model",
            )
        mixed = set_up(
            purify_model(
                bundle=bundle,
                data=data,
                method=SOUP,
                configs=configs,
                device=device,
                made=dsl.Collected(purified.outputs["purified"]),
                methods=methods,
                **shared,
            ),
            "purify_model",
        )
        mixed_evaluated = set_up(
            evaluate_model(
                bundle=mixed.outputs["purified"], data=data, name=SOUP, reference=bundle, device=device, **shared
            ),
            "evaluate_model",
        )
        selected = set_up(
            select_model(
                candidates=dsl.Collected(purified.outputs["purified"]),
                mixed=mixed.outputs["purified"],
                methods=methods,
                **records,
            ),
            "select_model",
        )
        chosen = selected.outputs["selected"]
        rescanned = set_up(
            scan_backdoor(
                bundle=chosen,
                data=data,
                name="rescan",
                scan=scan,
                policy=policy,
                methods=methods,
                device=device,
                earlier=scanned.outputs["scanned"],
                reference=bundle,
                **shared,
            ),
            "scan_backdoor",
        )
        exported = set_up(export_onnx(bundle=chosen, data=data, **shared), "export_onnx")
        gate = set_up(
            gate_promotion(
                fetched=fetched.outputs["evidence"],
                before=before.outputs["evidence"],
                scanned=scanned.outputs["evidence"],
                rescanned=rescanned.outputs["evidence"],
                control=control.outputs["evidence"],
                purified=dsl.Collected(purified.outputs["evidence"]),
                evaluated=dsl.Collected(evaluated.outputs["evidence"]),
                mixed=mixed.outputs["evidence"],
                mixed_evaluated=mixed_evaluated.outputs["evidence"],
                selected=selected.outputs["evidence"],
                exported=exported.outputs["evidence"],
                policy=policy,
                **records,
            ),
            "gate_promotion",
        )
        publish(chosen, exported.outputs["onnx"], gate.outputs["decision"], records, policy=policy)
