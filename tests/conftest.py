"""Hypothesis: few examples, no deadline, in CI the same ones every time. One thread: tiny tensors, shared cores."""

import os

import torch
from hypothesis import settings

settings.register_profile("here", deadline=None, max_examples=40)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(1)  # ten times faster here than two threads that wait for each other
