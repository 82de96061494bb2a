"""The Triton kernels compiled for GPUs that are not here: no register spills, and wgmma on Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attnctrl.kernels.offline import ARCHITECTURES, INT8, KERNELS, cuobjdump

PROGRAM = """
import json, sys
from attnctrl.kernels.offline import usages
for one in usages(architectures=(int(sys.argv[1]),)):
    print(json.dumps([[one.kernel, one.head_dim], one.registers, one.stack, one.spills, one.matrix]))
"""


@pytest.mark.slow
@pytest.mark.skipif(cuobjdump() is None, reason="this triton's wheel has no cuobjdump to read machine code with")
def test_default_tiles_do_not_spill_and_use_the_matrix_units(tmp_path: Path) -> None:
    # In other processes: in this one the kernels may be Python functions for the interpreter, which do not compile.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    compiling = {
        architecture: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(architecture)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for architecture in ARCHITECTURES
    }
    printed = {architecture: process.communicate()[0] for architecture, process in compiling.items()}
    assert all(process.returncode == 0 for process in compiling.values())
    for architecture, lines in printed.items():
        found = [json.loads(line) for line in lines.splitlines()]
        assert len(found) == 2 * len(KERNELS)
        for (kernel, head_dim), registers, stack, spills, matrix in found:
            name = f"{kernel}, head_dim {head_dim}, sm_{architecture}: {registers} registers"
            assert (stack, spills) == (0, 0), name
            if architecture == 90:
                assert matrix.get("HGMMA", 0) > 0, f"{name}: no wgmma"
                assert not {"HMMA", "IMMA"} & set(matrix), f"{name}: some products are not wgmma"
                assert ("IGMMA" in matrix) == (kernel == INT8), name
            else:
                assert sum(matrix.values()) > 0, name
