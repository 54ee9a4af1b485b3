"""In place of nsys and rocprofv3: `programs.py nsys|rocprofv3 WORDS` runs what it is given, then writes a report in the
documented format: a kernel in each range `actor_update` of the worker, on a clock of its own.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from manuals import NSYS_EXPORT, NSYS_PROFILE, ROCPROFV3, parse

KERNEL_NS = 20_000
TABLES = """CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO StringIds VALUES (1, 'standin_gemm');
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT, localTime TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, shortName INTEGER NOT NULL);"""


def nsys(words: list[str]) -> int:
    """`profile` writes its report as JSON, `export` makes the database of it."""
    verb, *words = words
    if verb == "export":
        given, (report,) = parse(words, NSYS_EXPORT)
        content = json.loads(Path(report).read_text())
        with closing(sqlite3.connect(given["output"])) as base:
            base.executescript(TABLES)
            base.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (?, '', '')", (content["start_ns"],))
            rows = [(at, at + KERNEL_NS) for at in content["kernels_ns"]]
            base.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 7, 1)", rows)
            base.commit()
        return 0
    assert verb == "profile"
    given, command = parse(words, NSYS_PROFILE)
    start_ns = time.time_ns()
    code = subprocess.call(command)
    output = Path(given["output"])
    kernels = [at - start_ns for at in updates_ns(output.parent, output.name)]
    time.sleep(1)
    output.with_name(f"{output.name}.nsys-rep").write_text(json.dumps({"start_ns": start_ns, "kernels_ns": kernels}))
    return code


def rocprofv3(words: list[str]) -> int:
    """Write kernels and markers, whose clock is the machine's."""
    given, command = parse(words, ROCPROFV3)
    assert given["output-format"] == "csv"
    process = subprocess.Popen(command)
    code = process.wait()
    folder, file = Path(given["output-directory"]), given["output-file"]
    target = str(folder / file.replace("%pid%", str(process.pid)))
    time.sleep(1)
    zero_ns = time.time_ns() - time.monotonic_ns()
    begin = ['"MARKER_CORE_RANGE_API"', f'"rlctl unix {zero_ns + 10}"', "7", "7", "1", "10", "20"]
    columns = '"Domain","Function","Process_Id","Thread_Id","Correlation_Id","Start_Timestamp","End_Timestamp"'
    Path(f"{target}_marker_api_trace.csv").write_text(f"{columns}\n{','.join(begin)}\n")
    rows = ['"Kind","Agent_Id","Queue_Id","Stream_Id","Kernel_Name","Start_Timestamp","End_Timestamp"']
    for at in updates_ns(folder, file.removesuffix("_%pid%")):
        rows.append(f'"KERNEL_DISPATCH","Agent 4",1,0,"standin_gemm",{at - zero_ns},{at - zero_ns + KERNEL_NS}')
    Path(f"{target}_kernel_trace.csv").write_text("\n".join(rows) + "\n")
    return code


def updates_ns(folder: Path, name: str) -> list[int]:
    """Return when the worker's updates began."""
    contents = [json.loads(file.read_text()) for file in sorted(folder.glob(f"step_*/{name}.ranges.json"))]
    return [one["start_ns"] for content in contents for one in content["ranges"] if one["name"] == "actor_update"]


if __name__ == "__main__":
    sys.exit({"nsys": nsys, "rocprofv3": rocprofv3}[sys.argv[1]](sys.argv[2:]))
