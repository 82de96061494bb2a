"""The Triton kernels compiled for GPUs that are not here: no register spills, and wgmma on Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attnctrl.kernels.offline import ARCHITECTURES, KERNELS, cuobjdump

PROGRAM = """
import json, torch
from attnctrl.kernels.offline import usages
for head_dims, dtype in (((64, 128), torch.bfloat16),):
    for one in usages(head_dims, (dtype,)):
        key = [one.kernel, one.head_dim, one.architecture]
        print(json.dumps([key, one.registers, one.stack, one.spills, one.matrix]))
"""


@pytest.mark.slow
@pytest.mark.skipif(cuobjdump() is None, reason="this triton's wheel has no cuobjdump to read machine code with")
def test_default_tiles_do_not_spill_and_use_the_matrix_units(tmp_path: Path) -> None:
    # In another process: in this one the kernels may be Python functions for the interpreter, which do not compile.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(KERNELS) * len(ARCHITECTURES)
    for (kernel, head_dim, architecture), registers, stack, spills, matrix in found:
        name = f"{kernel}, head_dim {head_dim}, sm_{architecture}: {registers} registers"
        assert (stack, spills) == (0, 0), name
        if architecture == 90:
            assert matrix.get("HGMMA", 0) > 0, f"{name}: no wgmma"
            assert "HMMA" not in matrix, f"{name}: some products are not wgmma"
        else:
            assert sum(matrix.values()) > 0, name
