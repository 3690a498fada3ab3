"""One thread per worker and hypothesis profiles; the same for every suite."""

import os

import torch
from hypothesis import HealthCheck, settings

# Several workers run at once; more threads than cores would make them many times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for programs that tests start

# `make test` must give the same answer twice, so examples are derived from the test itself. To look for new
# counterexamples: HYPOTHESIS_PROFILE=explore MASKOPT_EXAMPLES=10 python -m pytest tests
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("explore", print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
