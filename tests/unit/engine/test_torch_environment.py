"""What the engine process sets for torch's libraries, before torch is there: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

PRODUCTS = """
from sensorium.engine.loop import set_torch_environment
set_torch_environment()
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

SHAPES = """
import os
from sensorium.engine.loop import set_torch_environment
set_torch_environment()
import torch
from sensorium import kernels
from sensorium.system.processes import resident_bytes

torch.set_num_threads(1)
form = kernels.empty_linear(512, 512, dtype=torch.float32, device=torch.device("cpu"))
form.fill(0, torch.randn(512, 512))
before = 0
for rows in range(1, 512):
    form(torch.randn(rows, 512))
    if rows == 80:
        before = resident_bytes([os.getpid()])
print((resident_bytes([os.getpid()]) - before) // 2**20)
"""


def test_float32_products_do_not_depend_on_the_number_of_threads() -> None:
    """Small shapes; without the setting some differ where torch multiplies through MKL."""
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_shapes_are_not_kept_for_ever() -> None:
    """Batches of 1 to 511 rows: 30 to 90 MiB, and 320 without the setting, where oneDNN multiplies."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128, done.stdout
