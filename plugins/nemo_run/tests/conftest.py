"""NeMo-Run is no part of this workspace's environment: without it there is nothing to test here."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("nemo_run") else ["test_*.py"]
