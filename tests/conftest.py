"""Settings for every test: one torch thread per process, quiet libraries, and property tests that repeat exactly.

Triton is switched to its interpreter where there is no GPU: it asks only once, when its kernels (and its own library's)
are defined, so that must be before anything imports triton, which diffusers does and torch does not.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports a Hugging Face library

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from diffusers.utils import logging as diffusers_logging
from hypothesis import settings
from transformers.utils import logging as transformers_logging

# The models are so small that threads cost more than they save.
torch.set_num_threads(1)
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()

settings.register_profile("attnctrl", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("attnctrl")
