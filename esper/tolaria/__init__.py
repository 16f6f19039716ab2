"""Tolaria, the trainer: the loop, the optimizer and its surgery, checkpoints, the governor, and what it all cost."""
