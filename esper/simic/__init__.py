"""Simic trains Tamiyo's learned policy: from what runs logged, and from rollouts that are real trainings.

Above Tamiyo, whose observations and choices it learns from; knows no trainer. Importing it brings no torch.
"""
