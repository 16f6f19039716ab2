"""A new policy in shadow beside the one before: what is compared, and when it has passed. Pure functions."""

from __future__ import annotations

import math

from esper.config import CanaryConfig
from esper.leyline import AdaptationSignal, CanaryRecord, CanaryVerdict


def compare(record: CanaryRecord, before: AdaptationSignal, new: AdaptationSignal) -> CanaryRecord:
    """Takes in one decision of both."""
    agreed, waited = _wants(before) == _wants(new), not before.commands and not new.commands
    changes: dict[str, float] = {
        "num_decisions": record.num_decisions + 1,
        "num_agreed": record.num_agreed + agreed,
        "num_actions": record.num_actions + (not waited),
        "num_actions_agreed": record.num_actions_agreed + (agreed and not waited),
    }
    if new.value is not None:
        changes["num_values"] = record.num_values + 1
        changes["value"] = record.value + (new.value - record.value) / (record.num_values + 1)
    if before.value is not None:
        changes["num_values_before"] = record.num_values_before + 1
        changes["value_before"] = record.value_before + (before.value - record.value_before) / (
            record.num_values_before + 1
        )
    return record.model_copy(update=changes)


def fail(record: CanaryRecord, reason: str) -> CanaryRecord:
    """Ends it: the new policy is not fit."""
    return record.model_copy(update={"verdict": CanaryVerdict.FAILED, "reason": reason})


def judge(record: CanaryRecord, config: CanaryConfig) -> CanaryRecord:
    """Ends it once enough was compared, with the reason; returns it as it is before."""
    if record.num_decisions < config.decisions:
        return record
    words = f"agreed in {record.num_agreed} of {record.num_decisions} decisions"
    if record.num_agreed / record.num_decisions < config.min_agreement:
        return fail(record, f"{words}, less than {config.min_agreement:.0%}")
    if record.num_actions < config.actions:
        return record  # both have waited nearly always: there is nothing to judge by
    if record.num_actions:
        words += f", in {record.num_actions_agreed} of {record.num_actions} in which one of them acted"
        if record.num_actions_agreed / record.num_actions < config.min_action_agreement:
            return fail(record, f"{words}, less than {config.min_action_agreement:.0%}")
    return _judge_values(record, config, words)


def _judge_values(record: CanaryRecord, config: CanaryConfig, words: str) -> CanaryRecord:
    if not record.num_values:
        if config.require_value:
            return fail(record, f"{words}, but it predicts no value")
        return _passed(record, f"{words}; it predicts no value, and none is required")
    words += f", predicted {record.value:+.4f}, the one before {record.value_before:+.4f}"
    if not math.isfinite(record.value) or record.value < record.value_before - config.max_value_loss:
        return fail(record, f"{words}: more than {config.max_value_loss:g} less")
    return _passed(record, words)


def _passed(record: CanaryRecord, reason: str) -> CanaryRecord:
    return record.model_copy(update={"verdict": CanaryVerdict.PASSED, "reason": reason})


def _wants(signal: AdaptationSignal) -> frozenset[tuple[str, str, str | None]]:
    return frozenset((command.action.value, command.site, command.blueprint) for command in signal.commands)
