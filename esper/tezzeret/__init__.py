"""Tezzeret, the compile pool: turns a blueprint and a site signature into a signed kernel."""
