"""The library's public face, and its composition root: here, and only here, the systems of `esper` are put together.

For people: `grow`, `wrap`, `export`, `Task`, `Run`, `Grown`. For the runtime (`actors/`) and for tests and benchmarks
without one: `train_local`, the one function that trains a workload in this process:

    train_local(
        workload: Workload,                      # esper.tolaria.workload
        config: RunConfig,
        *,
        directory: str,                          # address of <storage>/runs/<run_id>, any fsspec address
        run_id: str,
        hub: AssetHub,
        bus: Bus,
        controller: Controller,
        public_key: bytes,                       # Ed25519, raw 32 bytes: whose kernels may be grafted
        ranks: Ranks = SoloRanks(),              # esper.tolaria.ranks; TorchRanks under torch.distributed
        stop: Callable[[], str | None] = never,  # asked at every step; a reason ends the run cleanly
        faults: FaultPlan = NoFaults(),
        resume: bool = False,                    # go on from the last whole checkpoint in `directory`, if there is one
        on_epoch: Callable[[EpochRecord], None] | None = None,   # after each epoch, on every rank (ray.train.report)
    ) -> RunSummary

It writes `summary.json`, `history.json`, `checkpoints/` and, in deterministic mode, `commands.jsonl` below
`directory` (rank 0 alone), and returns the summary. Errors are raised after the summary says FAILED.

The runtime is found through the entry point group `esper.runtime`, name `ray`; the object is a function

    run(workload_factory: Callable[[], Workload], config: RunConfig) -> RunResult

which brings up whatever it needs, calls `train_local` in its trainers and returns where the run lies.
"""
