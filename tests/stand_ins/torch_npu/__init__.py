"""In place of torch_npu: profiler and marks with the signatures of its documentation, which refuse all else.

What it writes has the documented names and formats: in each range marked meanwhile a kernel, a collective and a copy.
"""

from __future__ import annotations

from torch_npu import npu, profiler

__all__ = ["npu", "profiler"]
