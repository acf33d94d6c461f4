"""Additive attention beside what else computes it: time and peak memory."""
