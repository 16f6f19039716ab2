"""Tamiyo decides: when a host has stopped learning, where it should grow, with which kernel, and when to stop.

Pure Python over Leyline's contracts: no torch, no ray, no clock.
"""

from esper.tamiyo.controller import LocalController
from esper.tamiyo.memory import TamiyoState, initial_state
from esper.tamiyo.policies import Order, Policy, Proposal
from esper.tamiyo.step import step

__all__ = ["LocalController", "Order", "Policy", "Proposal", "TamiyoState", "initial_state", "step"]
