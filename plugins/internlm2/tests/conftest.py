"""The reference model is known to transformers before a test asks for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import internlm2_modeling  # noqa: F401
