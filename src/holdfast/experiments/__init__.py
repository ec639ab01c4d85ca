"""Experiments: train, evaluate, audit and compare networks; the one place where training meets evaluation."""
