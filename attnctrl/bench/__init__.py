"""The harness: every method measured on the same tasks, with intervals, as a table and as JSON.

attnctrl bench layout | fidelity | dose | overhead | kernels
attnctrl bench layout --split tune --images 24 --objects 2 --methods "none,loco{scale=30|60;iterations=3}"
"""

from attnctrl.bench.command import add_arguments, main

__all__ = ["add_arguments", "main"]
