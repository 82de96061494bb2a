"""Compiles the Triton kernels for a GPU that need not be there, and reads what the machine code uses.

    python -m attnctrl.kernels.offline            a Markdown table: registers, stack, spills, matrix instructions

`cuobjdump` comes in triton's own wheel. Not under TRITON_INTERPRET=1, where kernels are plain Python functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnctrl.kernels import blocks_autograd
from attnctrl.kernels.blocks_triton import block_forward_kernel
from attnctrl.kernels.blocks_triton_key import block_key_value_kernel
from attnctrl.kernels.blocks_triton_query import block_query_kernel
from attnctrl.kernels.groups_autograd import constants
from attnctrl.kernels.groups_triton import forward_kernel
from attnctrl.kernels.groups_triton_key import key_value_kernel
from attnctrl.kernels.groups_triton_query import query_kernel
from attnctrl.kernels.launch import Tile, tiles_for

ARCHITECTURES = (80, 90, 100)
KERNELS = {
    "forward": forward_kernel,
    "query": query_kernel,
    "key_value": key_value_kernel,
    "block_forward": block_forward_kernel,
    "block_int8": block_forward_kernel,
    "block_query": block_query_kernel,
    "block_key_value": block_key_value_kernel,
}
BLOCKS, INT8 = "block_", "block_int8"
"""The names of the kernels for sparse blocks begin so. They are compiled with everything that a mask can have."""
BLOCK = 128
"""The blocks that those are compiled for by default."""
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TYPES = {
    **dict.fromkeys(("lse", "grad_lse", "offsets"), "*fp32"),
    **dict.fromkeys(("query_bits", "key_bits"), "*i64"),
    **dict.fromkeys(("col_idx", "full_start", "full_count", "partial_start", "partial_count"), "*i32"),
    **dict.fromkeys(("heads", "queries", "keys", "list_b", "query_bits_b", "key_bits_b"), "i32"),
    "scale": "fp32",
}
BLOCK_TYPES = {
    **TYPES,
    **dict.fromkeys(("full_start", "partial_start"), "*i64"),
    **dict.fromkeys(("pattern_idx", "query_first", "query_length", "key_first", "key_length"), "*i32"),
    "patterns": "*i64",
    "hidden": "*u8",
    **dict.fromkeys(("rows", "columns", "list_h", "hidden_b"), "i32"),
    **dict.fromkeys(("query_scale", "key_scale"), "*fp32"),
}
"""The arguments' types, but for the tensors of the element type and their strides."""


@dataclass(frozen=True)
class Usage:
    """What one kernel uses: registers per thread, bytes of stack per thread, spilling stores, bytes of shared memory.

    matrix: how many instructions of each kind do the products: HMMA (mma), HGMMA (wgmma, sm_90), UTC*MMA (tcgen05);
    IMMA and IGMMA for integers.
    """

    kernel: str
    architecture: int
    head_dim: int
    dtype: torch.dtype
    tile: Tile
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: dict[str, int]

    def cells(self) -> list[str]:
        size = f"{self.tile.queries}x{self.tile.keys}, {self.tile.warps}, {self.tile.stages}"
        matrix = ", ".join(f"{count} {name}" for name, count in self.matrix.items())
        use = (self.registers, self.stack, self.spills, self.shared // 1024)
        kind = f"{ELEMENTS[self.dtype]}, {self.head_dim}"
        return [self.kernel, kind, size, f"sm_{self.architecture}", *map(str, use), matrix]


HEAD = ("kernel", "type, head_dim", "tile, warps, stages", "arch", "registers", "stack", "spills", "KiB", "matrix")


def usage(
    name: str, head_dim: int, dtype: torch.dtype, architecture: int, tile: Tile | None = None, block: int = BLOCK
) -> Usage:
    """Compile one of KERNELS as it is launched for contiguous heads of aligned tensors.

    block: the size of blocks, of queries and of keys, where the kernel is for sparse blocks.

    Raises:
        RuntimeError: the kernels are interpreted, or the compiled code cannot be read.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Under TRITON_INTERPRET=1 nothing is compiled: unset it before triton is imported.")
    kernel: Any = KERNELS[name]
    if name.startswith(BLOCKS):
        role = "forward" if name == INT8 else name.removeprefix(BLOCKS)
        sizes = (head_dim, dtype, architecture, block, block)
        own = blocks_autograd.int8_tile(*sizes) if name == INT8 else getattr(blocks_autograd.block_tiles(*sizes), role)
        tile = tile or own
        given, types = blocks_autograd.constants(head_dim, dtype, tile, block, block), BLOCK_TYPES
        if name == INT8:
            types = {**types, "query": "*i8", "key": "*i8"}
        elif role == "forward":
            given |= {"query_scale": None, "key_scale": None}
    else:
        tile = tile or getattr(tiles_for(head_dim, dtype, architecture), name)
        given, types = constants(head_dim, dtype, tile), TYPES
    options = {option: given.pop(option) for option in ("num_warps", "num_stages")}
    given |= {argument: 1 for argument in kernel.arg_names if argument.endswith("_d")}
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        stride = re.fullmatch(r"(query|key|value|output|grad)_[bht]", argument)
        kind = "constexpr" if argument in given else "i32" if stride else types.get(argument, f"*{ELEMENTS[dtype]}")
        signature[argument] = kind
        if stride or kind.startswith("*"):  # what the launcher finds out about usual tensors
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, given, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    resources, code = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", resources)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    found = re.findall(r"\b([HI]GMMA|[HI]MMA|UTC\w*MMA)\b", code)
    matrix = {kind: found.count(kind) for kind in sorted(set(found))}
    spills = len(re.findall(r"\bSTL\b", code))
    return Usage(name, architecture, head_dim, dtype, tile, registers, stack, spills, compiled.metadata.shared, matrix)


def usages(
    head_dims: Sequence[int] = (64, 128),
    dtype: torch.dtype = torch.bfloat16,
    architectures: Sequence[int] = ARCHITECTURES,
) -> Iterator[Usage]:
    """Every kernel for every head_dim and architecture, with the tiles of the table."""
    for head_dim in head_dims:
        for name in KERNELS:
            for architecture in architectures:
                yield usage(name, head_dim, dtype, architecture)


def cuobjdump() -> Path | None:
    """The disassembler inside triton's wheel; None where the wheel has none."""
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found if found.exists() else None


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("This triton has no cuobjdump, so its machine code cannot be read.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        outputs = [
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    return outputs[0], outputs[1]


if __name__ == "__main__":
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for one in usages():
        print("| " + " | ".join(one.cells()) + " |", flush=True)
