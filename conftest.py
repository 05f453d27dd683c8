"""One OpenMP thread in the test process: ranks are forked from it, and OpenMP does not survive that with more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
