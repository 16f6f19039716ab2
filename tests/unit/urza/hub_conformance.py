"""What every asset hub must do. A test module inherits these classes and gives the fixtures `hub` (and `clock`)."""

from __future__ import annotations

import pytest
from urza_samples import BUILD, IMAGE, NEXT_BUILD, VECTOR, WIDE, artifact_of, compiled, design, report_of

from esper.leyline import (
    BlueprintError,
    BlueprintIR,
    BlueprintStatus,
    Check,
    ConflictError,
    Evidence,
    EvidenceKind,
    Fault,
    KernelRejectedError,
    KernelStatus,
    KernelTag,
    LeaseLostError,
    Node,
    NotFoundError,
    Outcome,
    Pipeline,
    SiteKind,
    TamperedError,
    ValidationReport,
)
from esper.leyline.catalogue import (
    Backlog,
    BenchmarkResult,
    BlueprintOrder,
    BlueprintQuery,
    Census,
    Ids,
    KernelBrief,
    KernelOrder,
    KernelQuery,
)
from esper.urza.catalog import GUESSED_S, TargetState
from esper.urza.rules import MAX_DEATHS, MAX_ERRORS, MAX_LOG


class HubConformance:
    """One design's way through the hub, and every way it is refused. No test needs time to pass."""

    def test_a_design_becomes_a_kernel_that_can_be_fetched(self, hub):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR], tags=["small"], submitted_by="me")
        assert blueprint.status is BlueprintStatus.UNVALIDATED
        assert (blueprint.targets, blueprint.version, blueprint.submitted_by) == ((VECTOR,), 1, "me")
        assert hub.pending([VECTOR]) == 1
        assert hub.pending([WIDE]) == 0

        job = hub.claim("w1", fingerprint=BUILD)
        assert (job.blueprint.blueprint_id, job.signature, job.worker) == (blueprint.blueprint_id, VECTOR, "w1")
        assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.COMPILING
        assert hub.pending([VECTOR]) == 1
        assert hub.claim("w2", fingerprint=BUILD) is None

        record, container = artifact_of(job)
        assert hub.complete(job, record, container) == record
        assert hub.pending([VECTOR]) == 0
        assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.VALIDATED
        assert hub.kernel(record.kernel_id) == record
        assert hub.kernels(signature=VECTOR) == hub.kernels(blueprint_id=blueprint.blueprint_id) == [record]
        assert hub.kernels(signature=WIDE) == []
        fetched = hub.fetch(record.kernel_id)
        assert bytes(fetched) == container
        assert fetched.readonly

    def test_briefs_are_what_one_chooses_by(self, hub):
        wide = compiled(hub, "wide", target=WIDE, tags=("small",))
        first = compiled(hub, "first", risk_score=0.25)
        second = compiled(hub, "second")
        retired = compiled(hub, "retired")
        hub.mark_kernel(retired.kernel_id, KernelStatus.RETIRED, "bench")
        assert hub.kernel_briefs(VECTOR) == [KernelBrief.of(first), KernelBrief.of(second)]
        assert hub.kernel_briefs(WIDE, pipeline=Pipeline.FAST) == [KernelBrief.of(wide)]
        assert hub.kernel_briefs(WIDE, pipeline=Pipeline.OPTIMIZED) == hub.kernel_briefs(IMAGE) == []
        [brief] = hub.kernel_briefs(WIDE)
        assert (type(brief), brief.blueprint, brief.tags, brief.pipeline) == (
            KernelBrief, "wide", ("small",), Pipeline.FAST,
        )  # fmt: skip
        assert hub.count_kernels([VECTOR, WIDE, VECTOR]) == 3
        assert hub.count_kernels([VECTOR], pipeline=Pipeline.OPTIMIZED) == hub.count_kernels([]) == 0

    def test_submitting_again_is_the_same_blueprint_and_compiles_nothing_again(self, hub):
        first = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        again = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, VECTOR])
        assert again == first
        job = hub.claim("w", fingerprint=BUILD)
        hub.complete(job, *artifact_of(job))
        done = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        assert done.status is BlueprintStatus.VALIDATED
        assert hub.claim("w", fingerprint=BUILD) is None
        assert len(hub.blueprints()) == 1

    def test_another_design_under_the_name_is_its_next_version(self, hub):
        first = hub.submit_blueprint(design(4), name="adapter", targets=[])
        second = hub.submit_blueprint(design(6), name="adapter", targets=[], parent_id=first.blueprint_id)
        other = hub.submit_blueprint(design(4), name="other", targets=[])
        assert (first.version, second.version, other.version) == (1, 2, 1)
        assert second.parent_id == first.blueprint_id
        assert hub.blueprints(name="adapter") == [first, second]
        assert hub.blueprints(status=BlueprintStatus.VALIDATED) == []

    def test_a_target_that_does_not_fit_is_recorded_with_its_reason_and_not_queued(self, hub):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[IMAGE, VECTOR])
        assert blueprint.targets == (VECTOR,)
        misfit, fit = hub.targets(blueprint.blueprint_id)
        assert (misfit.signature, misfit.state, fit.state) == (IMAGE, TargetState.UNFIT, TargetState.QUEUED)
        assert "feature_map" in misfit.reason
        assert hub.pending([IMAGE, VECTOR]) == 1
        assert hub.claim("w", fingerprint=BUILD).signature == VECTOR

    def test_malformed_submissions_change_nothing(self, hub):
        bad = design().model_copy(update={"nodes": (Node(id="up", op="no_such_op"),)})
        with pytest.raises(BlueprintError):
            hub.submit_blueprint(bad, name="adapter", targets=[VECTOR])
        with pytest.raises(BlueprintError) as caught:
            hub.submit_blueprint(design(), name="not a name", targets=[VECTOR])
        assert caught.value.field == "name"
        with pytest.raises(BlueprintError) as caught:
            hub.submit_blueprint(design(), name="adapter", targets=[VECTOR], priority=11)
        assert caught.value.field == "priority"
        with pytest.raises(NotFoundError):
            hub.submit_blueprint(design(), name="adapter", targets=[VECTOR], parent_id="nobody")
        assert hub.blueprints() == []
        assert hub.pending([VECTOR]) == 0

    def test_urgent_work_goes_first_then_the_oldest(self, hub):
        hub.submit_blueprint(design(2), name="late", targets=[VECTOR], priority=1)
        hub.submit_blueprint(design(3), name="first", targets=[VECTOR], priority=5)
        hub.submit_blueprint(design(4), name="second", targets=[VECTOR], priority=5)
        hub.submit_blueprint(design(5), name="raised", targets=[VECTOR], priority=0)
        hub.submit_blueprint(design(5), name="raised", targets=[VECTOR], priority=9)
        order = [hub.claim(f"w{n}", fingerprint=BUILD).blueprint.name for n in range(4)]
        assert order == ["raised", "first", "second", "late"]

    def test_a_target_is_compiled_by_each_pipeline_that_was_asked_for_and_fast_goes_first(self, hub):
        both = (Pipeline.OPTIMIZED, Pipeline.FAST)
        blueprint = hub.submit_blueprint(design(2), name="both", targets=[VECTOR], pipelines=both)
        hub.submit_blueprint(design(3), name="fast", targets=[VECTOR])
        assert blueprint.targets == (VECTOR,)
        assert [hub.pending([VECTOR]), hub.pending([VECTOR], pipeline=Pipeline.OPTIMIZED)] == [3, 1]
        made = []
        while (job := hub.claim("w", fingerprint=BUILD)) is not None:
            made.append(hub.complete(job, *artifact_of(job)))
        assert [(one.blueprint_name, one.pipeline) for one in made] == [
            ("both", Pipeline.FAST),
            ("fast", Pipeline.FAST),
            ("both", Pipeline.OPTIMIZED),
        ]
        assert hub.kernels(signature=VECTOR) == made
        assert hub.kernels(signature=VECTOR, pipeline=Pipeline.FAST) == made[:2]
        page = hub.search_kernels(KernelQuery(pipeline=Pipeline.OPTIMIZED))
        assert [page.total, *(entry.kernel for entry in page.kernels)] == [1, made[2]]
        hub.submit_blueprint(design(2), name="both", targets=[VECTOR], pipelines=both)
        assert hub.claim("w", fingerprint=BUILD) is None

    def test_native_code_for_a_gpu_is_left_to_a_worker_that_has_one(self, hub):
        site = VECTOR.model_copy(update={"device": "cuda"})
        hub.submit_blueprint(design(), name="adapter", targets=[site], pipelines=tuple(Pipeline))
        job = hub.claim("w", fingerprint=BUILD)
        assert job.pipeline is Pipeline.FAST
        hub.complete(job, *artifact_of(job))
        assert hub.claim("w", fingerprint=BUILD) is None
        job = hub.claim("gpu", fingerprint=NEXT_BUILD, device="cuda")
        assert job.pipeline is Pipeline.OPTIMIZED
        hub.complete(job, *artifact_of(job, fingerprint=NEXT_BUILD))
        # each kind of worker has its build: the newest of one does not age what the other made
        hub.submit_blueprint(design(), name="adapter", targets=[site], pipelines=tuple(Pipeline))
        assert hub.pending([site]) == 0

    def test_the_same_work_under_another_name_waits_for_its_result(self, hub):
        one = hub.submit_blueprint(design(), name="one", targets=[VECTOR])
        two = hub.submit_blueprint(design(), name="two", targets=[VECTOR])
        job = hub.claim("w1", fingerprint=BUILD)
        assert hub.claim("w2", fingerprint=BUILD) is None
        assert hub.claim("w2", fingerprint=NEXT_BUILD).blueprint.blueprint_id == two.blueprint_id
        hub.fail(job, "the output is not finite")
        assert hub.blueprint(one.blueprint_id).status is BlueprintStatus.INVALID

    def test_a_worker_that_asks_again_gets_the_lease_it_holds(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE])
        job = hub.claim("w", fingerprint=BUILD)
        assert hub.claim("w", fingerprint=BUILD) == job
        assert hub.claim("other", fingerprint=BUILD).signature != job.signature

    def test_completing_twice_is_harmless_and_another_result_of_the_same_work_does_not_count(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        job = hub.claim("w", fingerprint=BUILD)
        record, container = artifact_of(job)
        assert hub.complete(job, record, container) == hub.complete(job, record, container) == record
        assert hub.complete(job, *artifact_of(job, content=b"others")) == record
        assert hub.kernels() == [record]

    def test_an_artifact_that_is_not_what_was_asked_for_is_refused(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        job = hub.claim("w", fingerprint=BUILD)
        record, container = artifact_of(job)
        with pytest.raises(TamperedError):
            hub.complete(job, record, container + b"!")
        with pytest.raises(ConflictError) as caught:
            hub.complete(job, record.model_copy(update={"size_bytes": 1}), container)
        assert caught.value.field == "size_bytes"
        for field, value in {"signature": WIDE, "compile_key": "0" * 64, "blueprint_id": "another"}.items():
            with pytest.raises(ConflictError) as caught:
                hub.complete(job, record.model_copy(update={field: value}), container)
            assert caught.value.field == field
        with pytest.raises(KernelRejectedError):
            hub.complete(job, *artifact_of(job, passed=False))
        with pytest.raises(NotFoundError):
            hub.complete(job.model_copy(update={"job_id": "nothing"}), record, container)
        assert hub.kernels(status=None) == []
        assert hub.complete(job, record, container) == record

    def test_a_failure_belongs_to_its_target(self, hub):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE])
        bad = hub.claim("w1", fingerprint=BUILD)
        good = hub.claim("w2", fingerprint=BUILD)
        hub.fail(bad, "the output is not finite")
        hub.fail(bad, "said twice")
        assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.COMPILING
        hub.complete(good, *artifact_of(good))
        found = hub.blueprint(blueprint.blueprint_id)
        assert found.status is BlueprintStatus.VALIDATED
        assert found.reason == f"{bad.signature.key}: the output is not finite"
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE])
        assert hub.claim("w1", fingerprint=BUILD) is None

    def test_a_design_that_fails_everywhere_is_invalid_until_a_new_target_gives_it_another_trial(self, hub):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        hub.fail(hub.claim("w", fingerprint=BUILD), "the output is not finite")
        found = hub.blueprint(blueprint.blueprint_id)
        assert found.status is BlueprintStatus.INVALID
        assert "not finite" in found.reason
        assert hub.submit_blueprint(design(), name="adapter", targets=[VECTOR]).status is BlueprintStatus.INVALID
        tried_again = hub.submit_blueprint(design(), name="adapter", targets=[WIDE])
        assert tried_again.status is BlueprintStatus.UNVALIDATED
        job = hub.claim("w", fingerprint=BUILD)
        assert job.signature == WIDE
        hub.complete(job, *artifact_of(job))
        assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.VALIDATED

    def test_what_makes_the_compiler_fail_is_tried_again_and_then_given_up_with_its_log(self, hub):
        blueprint = hub.submit_blueprint(design(), name="poison", targets=[VECTOR])
        for attempt in range(1, MAX_ERRORS + 1):
            job = hub.claim("w", fingerprint=BUILD)
            is_tried_again = hub.release(job, Fault.ERROR, f"no compiler, {attempt}", log=f"{attempt} " * MAX_LOG)
            assert is_tried_again is (attempt < MAX_ERRORS)
            assert hub.release(job, Fault.ERROR, "said twice") is is_tried_again
            [target] = hub.targets(blueprint.blueprint_id)
            assert target.log == (f"{attempt} " * MAX_LOG)[-MAX_LOG:]
            assert f"no compiler, {attempt}" in target.reason
        found = hub.blueprint(blueprint.blueprint_id)
        assert found.status is BlueprintStatus.INVALID
        assert found.reason == f"{VECTOR.key}: given up after 3 attempts: no compiler, 3"
        assert hub.claim("w", fingerprint=BUILD) is None
        with pytest.raises(LeaseLostError):
            hub.complete(job, *artifact_of(job))

    def test_what_compilers_gave_up_may_be_asked_for_again_and_the_fast_kernel_stays(self, hub):
        both = (Pipeline.FAST, Pipeline.OPTIMIZED)
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR], pipelines=both)
        job = hub.claim("w", fingerprint=BUILD)
        assert job.pipeline is Pipeline.FAST
        record, container = artifact_of(job)
        hub.complete(job, record, container)
        for _ in range(MAX_ERRORS):
            hub.release(hub.claim("w", fingerprint=BUILD), Fault.ERROR, "no C++ compiler", log="g++: not found")
        found = hub.blueprint(blueprint.blueprint_id)
        assert (found.status, "no C++ compiler" in found.reason) == (BlueprintStatus.VALIDATED, True)
        assert hub.kernels(signature=VECTOR) == [record]
        assert hub.claim("w", fingerprint=BUILD) is None
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR], pipelines=both)
        again = hub.claim("w", fingerprint=BUILD)
        assert again.pipeline is Pipeline.OPTIMIZED
        native, container = artifact_of(again)
        hub.complete(again, native, container)
        assert hub.kernels(signature=VECTOR) == [record, native]
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR], pipelines=both)
        assert hub.claim("w", fingerprint=BUILD) is None

    def test_a_design_of_which_compilers_gave_up_all_is_invalid_until_it_is_asked_for_again(self, hub):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        for _ in range(MAX_ERRORS):
            hub.release(hub.claim("w", fingerprint=BUILD), Fault.ERROR, "no memory")
        assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.INVALID
        assert hub.submit_blueprint(design(), name="adapter", targets=[VECTOR]).status is BlueprintStatus.UNVALIDATED
        for _ in range(MAX_ERRORS):  # and then every error counts anew
            job = hub.claim("w", fingerprint=BUILD)
            assert job is not None
            hub.release(job, Fault.ERROR, "no memory")
        assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.INVALID

    def test_work_that_kills_the_compiler_is_given_up_sooner(self, hub):
        blueprint = hub.submit_blueprint(design(), name="poison", targets=[VECTOR])
        again = [hub.release(hub.claim("w", fingerprint=BUILD), Fault.DEATH, "SIGSEGV", log="!") for _ in range(2)]
        assert again == [True, False]
        [target] = hub.targets(blueprint.blueprint_id)
        assert (target.state, target.log) == (TargetState.FAILED, "!")

    def test_work_that_is_given_back_by_a_worker_that_ends_does_not_count(self, hub):
        hub.submit_blueprint(design(2), name="first", targets=[VECTOR])
        hub.submit_blueprint(design(3), name="second", targets=[VECTOR])
        for _ in range(2 * MAX_ERRORS):
            job = hub.claim("w", fingerprint=BUILD)
            assert job.blueprint.name == "first"
            assert hub.release(job, Fault.NONE, "the worker ends")
        hub.release(hub.claim("w", fingerprint=BUILD), Fault.ERROR, "no compiler")
        assert hub.claim("w", fingerprint=BUILD).blueprint.name == "second"  # what failed before goes last

    def test_a_job_that_another_has_cannot_be_given_back(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        lost = hub.claim("w1#a", fingerprint=BUILD)
        hub.claim("w1#b", fingerprint=BUILD)
        with pytest.raises(LeaseLostError):
            hub.release(lost, Fault.ERROR, "too late")

    def test_the_backlog_is_told_by_the_device_that_is_needed(self, hub):
        assert hub.backlog() == Backlog()
        gpu = VECTOR.model_copy(update={"device": "cuda"})
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, gpu], pipelines=tuple(Pipeline))
        job = hub.claim("w", fingerprint=BUILD)
        backlog = hub.backlog()
        assert (backlog.queued, backlog.leased) == ({"cpu": 2, "cuda": 1}, {"cpu": 1})
        assert [backlog.open("cpu"), backlog.open("cuda")] == [3, 1]
        assert backlog.work_s["cpu"] > backlog.work_s["cuda"] > 0.0
        hub.complete(job, *artifact_of(job, compile_s=7.0))
        native, quick = hub.backlog().work_s["cuda"], hub.backlog().work_s["cpu"]
        assert (native, quick) == (backlog.work_s["cuda"], native + 7.0)

    def test_designs_of_the_same_ir_share_one_kernel(self, hub):
        one = hub.submit_blueprint(design(), name="one", targets=[VECTOR])
        two = hub.submit_blueprint(design(), name="two", targets=[VECTOR])
        assert one.blueprint_id != two.blueprint_id
        job = hub.claim("w", fingerprint=BUILD)
        record, container = artifact_of(job)
        hub.complete(job, record, container)
        assert hub.claim("w", fingerprint=BUILD) is None
        assert hub.blueprint(two.blueprint_id).status is BlueprintStatus.VALIDATED
        assert hub.kernels(blueprint_id=one.blueprint_id) == hub.kernels(blueprint_id=two.blueprint_id) == [record]

    @pytest.mark.parametrize("is_later", [False, True], ids=["both-wait", "compiled-before"])
    def test_a_shared_kernel_goes_by_every_name_and_tag_and_counts_once(self, hub, is_later):
        def submit_mine():
            hub.submit_blueprint(design(), name="mine", targets=[VECTOR], tags=["my-tag", "adapter", "high_speed"])

        hub.submit_blueprint(design(), name="shipped", targets=[VECTOR], tags=["adapter"])
        if not is_later:
            submit_mine()
        job = hub.claim("w", fingerprint=BUILD)
        record, container = artifact_of(job, tags=("adapter", "low_memory"))
        hub.complete(job, record, container)
        if is_later:
            submit_mine()
        assert hub.claim("w", fingerprint=BUILD) is None
        [brief] = hub.kernel_briefs(VECTOR)
        assert (brief.kernel_id, brief.blueprint, brief.aliases) == (record.kernel_id, "shipped", ("mine",))
        assert brief.tags == ("adapter", "low_memory", "my-tag"), "high_speed is Urabrask's to give"
        assert hub.count_kernels([VECTOR]) == 1
        assert hub.kernel(record.kernel_id) == record, "what was signed stays as it is"

    @pytest.mark.parametrize("status", [KernelStatus.RETIRED, KernelStatus.REJECTED])
    def test_a_kernel_out_of_use_settles_no_new_work(self, hub, status):
        kernel = compiled(hub, "first")
        ir = hub.blueprint(kernel.blueprint_id).ir
        hub.mark_kernel(kernel.kernel_id, status, "diverged in a run")
        id_ = hub.submit_blueprint(ir, name="third", targets=[VECTOR]).blueprint_id
        assert hub.claim("w", fingerprint=BUILD) is None
        third = hub.blueprint(id_)
        assert third.status is BlueprintStatus.INVALID
        assert f"kernel {kernel.kernel_id[:12]}, which is {status.value}: diverged in a run" in third.reason
        assert hub.kernels() == hub.kernels(blueprint_id=id_) == []
        # another build is other work
        assert hub.claim("w", fingerprint=NEXT_BUILD) is None
        hub.submit_blueprint(ir, name="third", targets=[VECTOR])
        job = hub.claim("w", fingerprint=NEXT_BUILD)
        record, container = artifact_of(job, fingerprint=NEXT_BUILD)
        assert hub.complete(job, record, container) == record
        assert hub.kernels() == hub.kernels(blueprint_id=id_) == [record]
        assert hub.blueprint(id_).status is BlueprintStatus.VALIDATED

    def test_work_that_another_did_and_that_was_retired_meanwhile_fails(self, hub):
        """Two workers have targets of one work: the second asked with another build, and was updated on the way."""
        for name in ("one", "two"):
            hub.submit_blueprint(design(), name=name, targets=[VECTOR])
        first, second = hub.claim("w1", fingerprint=BUILD), hub.claim("w2", fingerprint=NEXT_BUILD)
        stands, container = artifact_of(first)
        hub.complete(first, stands, container)
        hub.mark_kernel(stands.kernel_id, KernelStatus.RETIRED, "too slow")
        for _ in range(2):  # a reply may be lost
            answer = hub.complete(second, *artifact_of(second, content=b"other"))
            assert (answer.kernel_id, answer.status) == (stands.kernel_id, KernelStatus.RETIRED)
        failed = hub.blueprint(second.blueprint.blueprint_id)
        assert (failed.status, "too slow" in failed.reason) == (BlueprintStatus.INVALID, True)
        assert hub.kernels() == []

    def test_workers_of_another_build_compile_what_is_asked_for_again(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        job = hub.claim("w", fingerprint=BUILD)
        old, container = artifact_of(job)
        hub.complete(job, old, container)
        assert hub.claim("w", fingerprint=NEXT_BUILD) is None
        again = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        assert again.status is BlueprintStatus.VALIDATED
        job = hub.claim("w", fingerprint=NEXT_BUILD)
        new, container = artifact_of(job, fingerprint=NEXT_BUILD)
        hub.complete(job, new, container)
        assert hub.kernels(signature=VECTOR) == [old, new]
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        assert hub.claim("w", fingerprint=NEXT_BUILD) is None

    def test_status_tables_hold(self, hub):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE])
        job = hub.claim("w", fingerprint=BUILD)
        with pytest.raises(ConflictError):
            hub.retire_blueprint(blueprint.blueprint_id, "too early: it is being compiled")
        record, container = artifact_of(job)
        hub.complete(job, record, container)
        hub.mark_kernel(record.kernel_id, KernelStatus.REJECTED, "diverged in a run")
        hub.mark_kernel(record.kernel_id, KernelStatus.REJECTED, "said twice")
        with pytest.raises(ConflictError):
            hub.mark_kernel(record.kernel_id, KernelStatus.VALIDATED, "no way back")
        assert hub.kernels(signature=VECTOR) == []
        assert [one.kernel_id for one in hub.kernels(status=KernelStatus.REJECTED)] == [record.kernel_id]
        hub.retire_blueprint(blueprint.blueprint_id, "a better one exists")
        assert hub.pending([WIDE]) == 0
        assert hub.claim("w", fingerprint=BUILD) is None
        with pytest.raises(ConflictError):
            hub.submit_blueprint(design(), name="adapter", targets=[WIDE])

    def test_reports_need_a_kernel_and_may_be_repeated(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        job = hub.claim("w", fingerprint=BUILD)
        record, container = artifact_of(job)
        with pytest.raises(NotFoundError):
            hub.report(report_of(record))
        hub.complete(job, record, container)
        report = report_of(record)
        hub.report(report)
        hub.report(report)
        assert sum(hub.outcomes(record.kernel_id).values()) == 1

    def test_what_does_not_exist_is_not_found(self, hub):
        for ask in (hub.blueprint, hub.lineage, hub.outlook, hub.kernel, hub.kernel_entry, hub.fetch):
            with pytest.raises(NotFoundError):
                ask("0" * 64)
        with pytest.raises(NotFoundError):
            hub.benchmark(BenchmarkResult(kernel_id="0" * 64, name="step", speed=1.0))

    def test_lineage_goes_from_a_design_to_the_root(self, hub):
        root = hub.submit_blueprint(design(4), name="adapter", targets=[])
        child = hub.submit_blueprint(design(5), name="adapter", targets=[], parent_id=root.blueprint_id)
        grandchild = hub.submit_blueprint(design(6), name="wider", targets=[], parent_id=child.blueprint_id)
        hub.submit_blueprint(design(7), name="stranger", targets=[])
        assert hub.lineage(grandchild.blueprint_id) == [grandchild, child, root]
        assert hub.lineage(root.blueprint_id) == [root]
        children = hub.search_blueprints(BlueprintQuery(parent_id=root.blueprint_id))
        assert list(children.blueprints) == [child]

    def test_metadata_are_kept_and_must_be_plain_json_of_some_size(self, hub):
        metadata = {"paper": "arXiv", "widths": [1, 2], "nested": {"ok": True}}
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[], metadata=metadata)
        assert hub.blueprint(blueprint.blueprint_id).metadata == metadata
        for bad in ({"x": float("nan")}, {"x": {1, 2}}, {"x": "y" * 20_000}):
            with pytest.raises(BlueprintError) as caught:
                hub.submit_blueprint(design(5), name="bad", targets=[], metadata=bad)
            assert caught.value.field == "metadata"

    def test_blueprints_are_found_by_tag_name_and_status_in_pages(self, hub):
        made = [
            hub.submit_blueprint(design(n), name=name, targets=[], tags=tags, priority=priority)
            for n, (name, tags, priority) in enumerate(
                [("c", ["small", "conv"], 1), ("a", ["small"], 9), ("b", ["conv"], 5), ("d", [], 5)], start=1
            )
        ]

        def found(**query):
            page = hub.search_blueprints(BlueprintQuery(**query))
            return page.total, [blueprint.name for blueprint in page.blueprints]

        assert hub.search_blueprints(BlueprintQuery()).blueprints == tuple(made)
        assert found(tags_any=("small", "conv")) == (3, ["c", "a", "b"])
        assert found(tags_all=("small", "conv")) == (1, ["c"])
        assert found(tags_any=("nothing",)) == (0, [])
        assert found(name="b") == (1, ["b"])
        assert found(status=BlueprintStatus.VALIDATED) == (0, [])
        assert found(order=BlueprintOrder.NAME) == (4, ["a", "b", "c", "d"])
        assert found(order=BlueprintOrder.PRIORITY, descending=True, limit=2) == (4, ["a", "b"])
        assert found(descending=True, limit=2, offset=1) == (4, ["b", "a"])
        assert found(offset=9) == (4, [])

    def test_kernels_are_found_by_tags_status_blueprint_and_signature_in_pages(self, hub):
        one = compiled(hub, "one", tags=["small", "conv"], num_parameters=30)
        two = compiled(hub, "two", tags=["small"], num_parameters=10)
        three = compiled(hub, "three", tags=["conv"], num_parameters=20, target=WIDE)
        gone = compiled(hub, "gone", tags=["small", "conv"])
        hub.mark_kernel(gone.kernel_id, KernelStatus.RETIRED, "replaced")

        def found(**query):
            page = hub.search_kernels(KernelQuery(**query))
            return page.total, [entry.kernel for entry in page.kernels]

        gone = hub.kernel(gone.kernel_id)
        assert found() == (3, [one, two, three])
        assert found(status=None) == (4, [one, two, three, gone])
        assert found(status=KernelStatus.RETIRED) == (1, [gone])
        assert found(tags_any=("small", "conv")) == (3, [one, two, three])
        assert found(tags_all=("small", "conv")) == (1, [one])
        assert found(tags_all=("small",), tags_any=("conv",), status=None) == (2, [one, gone])
        assert found(tags_all=("nothing",)) == (0, [])
        assert found(signature=WIDE) == (1, [three])
        assert found(blueprint_id=two.blueprint_id) == (1, [two])
        assert found(blueprint_id="nobody") == (0, [])
        assert found(order=KernelOrder.PARAMETERS) == (3, [two, three, one])
        assert found(order=KernelOrder.PARAMETERS, descending=True, limit=1, offset=1) == (3, [three])
        assert found(descending=True) == (3, [three, two, one])
        assert found(limit=1, offset=1) == (3, [two])

    def test_measured_speed_is_kept_searched_and_ordered_by(self, hub):
        eager = compiled(hub, "eager")
        quick = compiled(hub, "quick", optimization_level=2)
        unknown = compiled(hub, "unknown", optimization_level=2)
        first = BenchmarkResult(kernel_id=quick.kernel_id, name="step", speed=0.9, figures={"forward_ms": 2.0})
        last = BenchmarkResult(kernel_id=quick.kernel_id, name="step", speed=1.5, spread=0.1)
        for result in (first, last, last, first):
            hub.benchmark(result)
        entry = hub.kernel_entry(quick.kernel_id)
        assert (entry.performance, entry.benchmarks) == (1.5, (first, last))
        assert hub.kernel_entry(eager.kernel_id).performance == 1.0
        assert hub.kernel_entry(unknown.kernel_id).performance is None

        def found(**query):
            return [entry.kernel for entry in hub.search_kernels(KernelQuery(**query)).kernels]

        assert found(min_performance=1.0) == [eager, quick]
        assert found(min_performance=1.2) == [quick]
        assert found(order=KernelOrder.PERFORMANCE) == [eager, quick, unknown]
        assert found(order=KernelOrder.PERFORMANCE, descending=True) == [quick, eager, unknown]

    def test_objects_that_are_no_ir_are_refused(self, hub):
        """What no parser lets through, but a pickle does: fields that are not what they say."""
        node = Node.model_construct(id="a", op="linear", inputs=("a",), params={"out": object})
        for fields in (
            {"fit": (SiteKind.VECTOR,), "nodes": (node,), "output": "a"},
            {"fit": None, "nodes": 7, "output": []},
            {"fit": (SiteKind.VECTOR,), "nodes": ("x" * 10_000,) * 100, "output": "a"},
            {},
        ):
            with pytest.raises(BlueprintError) as caught:
                hub.submit_blueprint(BlueprintIR.model_construct(**fields), name="garbage", targets=[VECTOR])
            assert len(str(caught.value)) < 500
        assert hub.blueprints() == []

    def test_risk_is_kept_searched_and_ordered_by(self, hub):
        def report(risk, *tags):
            checks = (Check(name="shape", passed=True),)
            terms = {} if risk is None else {"size": risk}
            return ValidationReport(
                checks=checks, risk_score=risk, risk_terms=terms, figures={"parameters": 72.0}, tags=tags
            )

        bold = compiled(hub, "bold", report=report(0.6, KernelTag.HIGH_RISK), tags=("conv", "high_risk"))
        safe = compiled(hub, "safe", report=report(0.1, KernelTag.LOW_RISK), tags=("conv", "low_risk"))
        unknown = compiled(hub, "unknown", report=report(None), tags=("conv",))
        assert hub.kernel_entry(safe.kernel_id).kernel.report == report(0.1, KernelTag.LOW_RISK)

        def found(**query):
            return [entry.kernel for entry in hub.search_kernels(KernelQuery(**query)).kernels]

        assert found(max_risk=1.0) == [bold, safe]
        assert found(max_risk=0.1) == [safe]
        assert found(max_risk=0.0) == []
        assert found(order=KernelOrder.RISK) == [safe, bold, unknown]
        assert found(order=KernelOrder.RISK, descending=True) == [bold, safe, unknown]
        assert found(tags_all=("conv", "low_risk")) == [safe]

    def test_statistics_add_up_fetches_outcomes_and_gains(self, hub):
        kernel = compiled(hub, "adapter")
        gains = [0.2, 0.4]
        for gain in gains:
            evidence = Evidence(kind=EvidenceKind.SHADOW, gain=gain, num_pairs=10)
            hub.report(report_of(kernel, evidence=evidence, seconds=2.0))
        nothing = Evidence(kind=EvidenceKind.NONE)
        hub.report(report_of(kernel, Outcome.CULLED, evidence=nothing, seconds=1.0))
        hub.fetch(kernel.kernel_id)
        hub.write_uses()
        statistics = hub.kernel_entry(kernel.kernel_id).statistics
        assert (statistics.num_reports, statistics.outcomes) == (3, {Outcome.FOSSILIZED: 2, Outcome.CULLED: 1})
        assert (statistics.num_gains, statistics.seconds) == (2, 5.0)
        assert statistics.mean_gain == pytest.approx(sum(gains) / 2)
        assert statistics.num_fetches >= 1

    def test_a_design_has_one_record_for_sites_of_a_kind_of_any_size(self, hub):
        small, other = compiled(hub, "adapter"), compiled(hub, "other")
        hub.submit_blueprint(hub.blueprint(small.blueprint_id).ir, name="adapter", targets=[WIDE])
        job = hub.claim("w", fingerprint=BUILD)
        wide = hub.complete(job, *artifact_of(job))
        for kernel, gain in ((small, 0.2), (wide, 0.4)):
            evidence = Evidence(kind=EvidenceKind.SHADOW, gain=gain, baseline=1.0, candidate=1.0 - gain, num_pairs=10)
            hub.report(report_of(kernel, evidence=evidence))
        hub.report(report_of(other, Outcome.UNFINISHED, evidence=evidence))  # nothing was decided: not counted
        records = {brief.kernel_id: brief.record for each in (VECTOR, WIDE) for brief in hub.kernel_briefs(each)}
        assert records[other.kernel_id] is None
        assert records[small.kernel_id] == records[wide.kernel_id]
        assert (records[wide.kernel_id].num, records[wide.kernel_id].mean) == (2, pytest.approx(0.3))

    def test_the_outlook_counts_what_comes_before(self, hub):
        hub.submit_blueprint(design(2), name="before", targets=[VECTOR, WIDE], priority=5)
        mine = hub.submit_blueprint(design(3), name="mine", targets=[VECTOR], priority=5)
        hub.submit_blueprint(design(4), name="after", targets=[VECTOR], priority=5)
        outlook = hub.outlook(mine.blueprint_id)
        assert (outlook.num_open, outlook.queue_position) == (1, 3)
        assert outlook.estimated_s == pytest.approx(3 * GUESSED_S[Pipeline.FAST])
        assert hub.backlog().work_s == {"cpu": pytest.approx(4 * GUESSED_S[Pipeline.FAST])}
        job = hub.claim("w", fingerprint=BUILD)
        hub.complete(job, *artifact_of(job, compile_s=4.0))
        outlook = hub.outlook(mine.blueprint_id)
        assert (outlook.queue_position, outlook.estimated_s) == (2, 8.0)
        while (job := hub.claim("w", fingerprint=BUILD)) is not None:
            hub.complete(job, *artifact_of(job, compile_s=4.0))
        outlook = hub.outlook(mine.blueprint_id)
        assert (outlook.num_open, outlook.queue_position, outlook.estimated_s) == (0, 0, 0.0)

    def test_the_signatures_that_runs_have_registered_are_known(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        assert hub.signatures() == []  # nobody said that a run has such a site
        hub.register_sites([WIDE, IMAGE, WIDE], run_id="one")
        hub.register_sites([IMAGE, VECTOR], run_id="two")
        hub.register_sites([VECTOR], run_id="three")
        hub.register_sites([], run_id="four")
        assert hub.signatures() == [WIDE, IMAGE, VECTOR]

    def test_ids_are_found_by_their_beginning(self, hub):
        kernels = [compiled(hub, f"d{n}") for n in range(3)]
        first = kernels[0]
        assert hub.ids(first.kernel_id[:20]) == Ids(kernels=(first.kernel_id,))
        assert hub.ids(first.blueprint_id) == Ids(blueprints=(first.blueprint_id,))
        every = hub.ids("")
        assert every.kernels == tuple(kernel.kernel_id for kernel in kernels)
        assert every.blueprints == tuple(kernel.blueprint_id for kernel in kernels)
        assert hub.ids("nothing") == Ids()

    def test_the_census_counts_what_there_is_and_what_waits(self, hub):
        hub.register_sites([VECTOR, WIDE], run_id="one")
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE, IMAGE])
        hub.submit_blueprint(design(5), name="other", targets=[VECTOR])
        job = hub.claim("w", fingerprint=BUILD)
        kernel = hub.complete(job, *artifact_of(job))
        hub.claim("w", fingerprint=BUILD)
        assert hub.census() == Census(num_blueprints=2, num_kernels=1, num_signatures=2, num_queued=1, num_compiling=1)
        hub.mark_kernel(kernel.kernel_id, KernelStatus.RETIRED, "replaced")
        assert hub.census().num_kernels == 0


class LeaseConformance:
    """What every asset hub whose clock a test can move must do."""

    def test_work_of_a_lost_lease_goes_to_another_and_the_first_worker_is_told(self, hub, clock):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        lost = hub.claim("w1", fingerprint=BUILD, lease_s=60.0)
        clock.time += 59.0
        assert hub.claim("w2", fingerprint=BUILD) is None
        clock.time += 1.0
        taken = hub.claim("w2", fingerprint=BUILD, lease_s=60.0)
        assert (taken.job_id, taken.worker) == (lost.job_id, "w2")
        with pytest.raises(LeaseLostError):
            hub.complete(lost, *artifact_of(lost))
        with pytest.raises(LeaseLostError):
            hub.fail(lost, "too late")
        record, container = artifact_of(taken)
        assert hub.complete(taken, record, container) == record
        assert hub.complete(lost, record, container) == record  # the same kernel, known by now

    def test_a_late_result_counts_while_nobody_else_has_the_work(self, hub, clock):
        blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE], priority=9)
        late = hub.claim("w1", fingerprint=BUILD, lease_s=1.0)
        clock.time += 2.0
        # another's claim ends the lease, takes the older target and leaves the other waiting
        hub.claim("w2", fingerprint=BUILD)
        waiting = next(one for one in hub.targets(blueprint.blueprint_id) if one.state is TargetState.QUEUED)
        lost = late.model_copy(update={"job_id": waiting.job_id, "signature": waiting.signature})
        record, container = artifact_of(lost)
        assert hub.complete(lost, record, container) == record

    def test_a_renewed_lease_holds_on_and_a_lost_one_cannot_be_renewed(self, hub, clock):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        job = hub.claim("w1", fingerprint=BUILD, lease_s=60.0)
        clock.time += 50.0
        renewed = hub.renew(job, lease_s=60.0)
        assert renewed == job.model_copy(update={"deadline": clock.time + 60.0})
        assert hub.renew(job, lease_s=60.0) == renewed  # a reply was lost: the lease is known by its name
        clock.time += 59.0
        assert hub.claim("w2", fingerprint=BUILD) is None
        assert hub.claim("w1", fingerprint=BUILD) == renewed
        clock.time += 1.0
        assert hub.claim("w2", fingerprint=BUILD).job_id == job.job_id
        with pytest.raises(LeaseLostError):
            hub.renew(renewed)

    def test_another_life_of_a_worker_ends_the_lease_of_the_one_before(self, hub):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
        lost = hub.claim("w1#a", fingerprint=BUILD)
        assert hub.claim("w10#b", fingerprint=BUILD) is None  # another worker
        again = hub.claim("w1#b", fingerprint=BUILD)
        assert (again.job_id, again.worker) == (lost.job_id, "w1#b")
        with pytest.raises(LeaseLostError):
            hub.complete(lost, *artifact_of(lost))

    def test_work_that_kills_its_workers_ends_as_failed(self, hub, clock):
        blueprint = hub.submit_blueprint(design(), name="poison", targets=[VECTOR])
        for attempt in range(MAX_DEATHS):
            assert hub.claim(f"w{attempt}", fingerprint=BUILD, lease_s=1.0) is not None
            clock.time += 1.0
        assert hub.claim("w", fingerprint=BUILD) is None
        found = hub.blueprint(blueprint.blueprint_id)
        assert found.status is BlueprintStatus.INVALID
        assert "its worker died or hung, the 2. time" in found.reason
        assert hub.pending([VECTOR]) == 0
