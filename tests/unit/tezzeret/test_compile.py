"""One compilation: what is recorded is what is in the container, and doing it twice gives the same kernel."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from esper.leyline import (
    Blueprint,
    BlueprintError,
    BlueprintIR,
    Check,
    CompileJob,
    KernelRejectedError,
    Node,
    Pipeline,
    SiteKind,
    SiteSignature,
    ValidationReport,
)
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import kernel_id_of, unpack
from esper.leyline.limits import IRLimits
from esper.leyline.lower import initialise, lower, seed_of
from esper.leyline.ops import count_flops
from esper.tezzeret.compile import build, compile_kernel, sign
from esper.tezzeret.fingerprint import target_fingerprint
from esper.urabrask.gauntlet import examine

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=6)
IR = BlueprintIR(
    fit=(SiteKind.VECTOR,),
    nodes=(
        Node(id="copied", op="linear", params={"init": "neighbour"}),
        Node(id="last", op="linear", inputs=("copied",), params={"init": "zeros"}),
    ),
    output="last",
    zero_at_birth=True,
)


def job(ir: BlueprintIR = IR, site: SiteSignature = SITE, **changes) -> CompileJob:
    blueprint = Blueprint(
        blueprint_id="b1", name="stack", ir=ir, ir_hash=canonical_hash(ir), tags=("test",), created_at=1.0
    )
    fields = {
        "job_id": "j1",
        "blueprint": blueprint,
        "signature": site,
        "pipeline": Pipeline.FAST,
        "worker": "w1",
        "deadline": 0.0,
    }
    return CompileJob.model_validate(fields | changes)


def compiled(what: CompileJob, fingerprint: str = "here"):
    return compile_kernel(what, fingerprint=fingerprint, private_key=KEY, examine=examine)


def test_record_and_container_agree():
    artifact, data = compiled(job())
    kernel = unpack(data, KEY.public_key())
    assert artifact.kernel_id == kernel_id_of(data) == kernel.kernel_id
    assert artifact.size_bytes == len(data)
    assert artifact.report.passed
    assert artifact.needs_neighbour
    assert artifact.zero_at_birth
    assert artifact.num_parameters == 2 * (6 * 6 + 6)
    assert artifact.flops_per_sample == count_flops(IR, SITE) == 2 * 2 * 6 * 6
    shared = set(type(kernel.manifest).model_fields) & set(type(artifact).model_fields) - {"report"}
    assert {name: getattr(kernel.manifest, name) for name in shared} == {n: getattr(artifact, n) for n in shared}
    assert kernel.manifest.report.checks == artifact.report.checks


def test_what_urabrask_found_is_in_the_record_and_but_for_timings_in_the_container():
    design = Blueprint(blueprint_id="b1", name="stack", ir=IR, ir_hash=canonical_hash(IR), tags=("mine", "high_risk"))
    artifact, data = compiled(job(blueprint=design))
    manifest = unpack(data, KEY.public_key()).manifest
    assert artifact.report.latencies
    assert manifest.report == artifact.report.repeatable() != artifact.report
    assert manifest.tags == artifact.tags == ("mine", "zero_at_birth", "low_risk")
    assert artifact.risk_score is not None
    assert 0.0 < artifact.risk_score <= 0.2


def test_weights_are_those_of_the_compile_key():
    artifact, data = compiled(job())
    expected = lower(IR, SITE)
    initialise(expected, IR, seed_of(artifact.compile_key))
    weights = unpack(data, KEY.public_key()).weights
    assert weights.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(torch.from_numpy(weights[name]), tensor)
    assert bool(expected.get_parameter("copied.weight").detach().abs().max() > 0)


def test_the_same_job_gives_the_same_bytes_and_another_build_another_kernel():
    torch.manual_seed(1)
    first = compiled(job())
    torch.manual_seed(2)
    again = compiled(job(worker="w2", deadline=9.0, job_id="j2"))
    assert first[1] == again[1]
    elsewhere = compiled(job(), "elsewhere")[0]
    assert elsewhere.compile_key != first[0].compile_key
    assert elsewhere.kernel_id != first[0].kernel_id


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_survive_the_container_exactly(dtype: str):
    site = SITE.model_copy(update={"dtype": dtype})
    artifact, data = compiled(job(site=site))
    expected = lower(IR, site)
    initialise(expected, IR, seed_of(artifact.compile_key))
    for name, array in unpack(data, KEY.public_key()).weights.items():
        tensor = expected.state_dict()[name]
        assert torch.equal(torch.from_numpy(array).to(tensor.dtype), tensor)


def test_what_was_built_without_a_key_travels_and_is_signed_elsewhere():
    built = build(job(), fingerprint="here", examine=examine)
    artifact, data = sign(pickle.loads(pickle.dumps(built)), KEY)
    assert data == compiled(job())[1]
    assert (artifact.report, artifact.compile_s) == (built.report, built.compile_s)
    assert built.manifest.report.seconds == 0.0
    assert built.report.seconds > 0.0


def test_optimized_is_refused_by_name():
    with pytest.raises(KernelRejectedError, match="optimized") as caught:
        compiled(job(pipeline=Pipeline.OPTIMIZED))
    assert caught.value.field == "pipeline"


def test_a_misfit_and_a_wrong_hash_are_refused():
    with pytest.raises(BlueprintError, match="does not fit"):
        compiled(job(site=SiteSignature(kind=SiteKind.SEQUENCE, channels=6, extent=(3,))))
    wrong = job().blueprint.model_copy(update={"ir_hash": "0" * 64})
    with pytest.raises(KernelRejectedError, match="hash"):
        compiled(job(blueprint=wrong))


def test_a_failed_check_is_refused_with_its_words():
    verdict = ValidationReport(checks=(Check(name="shape", passed=False, detail="too round"),))
    with pytest.raises(KernelRejectedError, match="stack: shape: too round"):
        compile_kernel(job(), fingerprint="here", private_key=KEY, examine=lambda *_: verdict)


def test_fingerprint_names_the_build_and_no_host():
    import platform

    fingerprint = target_fingerprint()
    assert fingerprint == target_fingerprint()
    assert re.fullmatch(r"torch-[\w.+]+-[0-9a-f]{12}-\w+-\w+(-[0-9a-f]{8})?", fingerprint)
    assert torch.__version__ in fingerprint
    assert platform.machine() in fingerprint


def test_a_design_above_a_limit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_args):
        raise AssertionError("it was built")

    limits = IRLimits(parameters=2 * (6 * 6 + 6) - 1)
    monkeypatch.setattr("esper.leyline.lower.lower", forbidden)
    with pytest.raises(KernelRejectedError, match="parameters is 84, above 83"):
        compile_kernel(job(), fingerprint="here", private_key=KEY, examine=forbidden, limits=limits)


def test_the_limits_are_checks_of_the_report():
    names = [check.name for check in compiled(job())[0].report.checks]
    assert names[:2] == ["limits.nodes", "limits.depth"]
    assert "gradient_health" in names
