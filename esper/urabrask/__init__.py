"""Urabrask, the crucible: examines a kernel before anyone may graft it."""
