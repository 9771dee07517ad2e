"""The training tool's modules under their own names."""

import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "train_demo"
sys.path.insert(0, str(TOOL))
