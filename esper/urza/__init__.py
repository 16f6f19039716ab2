"""Urza, the asset hub: blueprints, compile jobs and kernels; what it acknowledged is durable. Imports no torch."""
