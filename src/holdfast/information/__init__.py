"""Inference information s: its formulas, and the sources that compute it while a network trains."""
