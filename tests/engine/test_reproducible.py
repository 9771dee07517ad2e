"""What the engine process sets up so that no float32 result depends on the number of threads."""

from __future__ import annotations

import subprocess
import sys

PRODUCTS = """
import os
from sensorium.engine.core import REPRODUCIBLE
os.environ.setdefault(*REPRODUCIBLE)
import torch
from sensorium import kernels

torch.manual_seed(0)
cpu, differ = torch.device("cpu"), 0
for _ in range(150):
    n, k, m = (int(size) for size in torch.randint(1, 380, (3,)))
    form = kernels.empty_linear(n, k, dtype=torch.float32, device=cpu)
    form.fill(0, torch.randn(n, k))
    x, results = torch.randn(m % 90 + 1, k), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(form(x))
    form.rows(torch.tensor([0]))  # as a tied head's are: the product may have another form from here on
    tied = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tied.append(form(x))
    differ += any(not torch.equal(one[0], other) for one in (results, tied) for other in one[1:])
print(differ)
"""


def test_float32_products_do_not_depend_on_the_number_of_threads() -> None:
    """Small shapes; without the setting some differ where torch multiplies through MKL."""
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
