"""Designs that are nearly right, from submission to the end of the queue: refused, compiled, or settled as failed."""

from __future__ import annotations

import json
import random
from collections import Counter

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ir_mutations import any_signature, near_valid

from esper.leyline import BlueprintStatus, EsperError, SiteKind, SiteSignature
from esper.leyline.blueprints import parse_ir
from esper.leyline.limits import IRLimits
from esper.tezzeret.builder import InProcess
from esper.tezzeret.worker import Compiled, Idle, Rejected, work_once
from esper.urabrask.gauntlet import examine
from esper.urza.memory import MemoryHub

VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=8)
HUGE = SiteSignature(kind=SiteKind.VECTOR, channels=1 << 20)
LIMITS = IRLimits(parameters=1 << 16, flops=1 << 22, activation_bytes=1 << 18)


def test_every_design_is_refused_or_settled_with_its_reason():
    hub, chance, key = MemoryHub(), random.Random(5), Ed25519PrivateKey.generate()
    refused, taken = 0, []
    for n in range(40):
        raw = near_valid(chance)
        try:
            ir = parse_ir(json.dumps(raw))
            targets = [any_signature(chance, raw), VECTOR, HUGE]
            taken.append(hub.submit_blueprint(ir, name=f"d{n}", targets=targets))
        except EsperError:
            refused += 1
    builder = InProcess(examine, LIMITS)
    turns: Counter[type] = Counter()
    while Idle not in turns:
        turn = work_once(hub, builder, worker="w", private_key=key)
        turns[type(turn)] += 1
    assert set(turns) == {Compiled, Rejected, Idle}
    assert refused >= 10
    assert len(taken) >= 5
    ended = {BlueprintStatus.VALIDATED, BlueprintStatus.INVALID}
    assert {hub.blueprint(one.blueprint_id).status for one in taken} <= ended
    reasons = [target.reason for one in taken for target in hub.targets(one.blueprint_id) if target.reason]
    assert any("asks for too much" in reason for reason in reasons)
    assert all(len(reason) < 1_000 for reason in reasons)
