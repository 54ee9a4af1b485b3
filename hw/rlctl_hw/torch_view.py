"""What torch sees of the devices, asked in a process of its own: only on request, for the import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from rlctl_hw.host import Host, first_line
from rlctl_hw.types import Fact

LIMIT_S = 120.0
SOURCE = "torch, in a process of its own"
SCRIPT = """
import json
import torch
try:
    import torch_npu
except ImportError:
    torch_npu = None
part = torch.cuda if torch_npu is None else torch.npu
told = {"version": torch.__version__, "devices": []}
told["runtime"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
if torch.version.hip:
    told["runtime"] = f"ROCm {torch.version.hip}"
if torch_npu is not None:
    told["runtime"] = f"torch_npu {torch_npu.__version__}"
try:
    for index in range(part.device_count() if part.is_available() else 0):
        free, total = part.mem_get_info(index)
        sizes = {"free_gib": free / 2**30, "total_gib": total / 2**30}
        told["devices"].append({"name": part.get_device_name(index), **sizes})
    told["bf16"] = bool(part.is_bf16_supported()) if told["devices"] else None
except RuntimeError as error:
    told["error"] = str(error)
print(json.dumps(told))
"""


def torch_facts(host: Host) -> dict[str, Fact]:
    """Return torch's version, the runtime it was built for, its devices and whether they know bfloat16."""
    told = host.answer("torch", ask_torch)
    if not isinstance(told, dict) or "version" not in told:
        error = told.get("error") if isinstance(told, dict) else "torch was not asked"
        return {"torch.version": Fact(None, SOURCE, str(error))}
    runtime = told.get("runtime")
    return {
        "torch.version": Fact(told["version"], SOURCE),
        "torch.runtime": Fact(runtime, SOURCE, None if runtime else "built for the CPU alone"),
        "torch.devices": Fact(told.get("devices"), SOURCE, told.get("error")),
        "torch.bf16": Fact(told.get("bf16"), SOURCE, "no device to ask" if told.get("bf16") is None else None),
    }


def ask_torch(script: str = SCRIPT, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Return what the script prints, or `error`."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, timeout=limit_s, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch gave no answer within {limit_s:g} s"}
    except OSError as error:
        return {"error": f"python does not start: {error}"}
    lines = done.stdout.decode("utf-8", errors="replace").strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        complaint = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
        return {"error": first_line(complaint[-1] if complaint else f"python ended with code {done.returncode}")}
