"""`python -m rlctl_train RUN_DIR`: the one door into the workshop.

Starts a run, or continues it where it was saved.

Exit codes: 0 done, 1 failed, 3 a health gate failed, 4 preflight failed, 5 no cluster,
130 stopped by a signal after saving.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import traceback
from pathlib import Path

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, INTERRUPTED, OK, OUT_OF_MEMORY, USAGE
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.trainer import PROCESS_ENVIRONMENT
from rlctl_train.importing import uncollected
from rlctl_train.status import Status

UNSAVED = {"what": "stopped before it could save", "remedy": "resume continues from the last checkpoint"}


def main() -> int:
    """Run the folder named on the command line; return the exit code."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m rlctl_train RUN_DIR", file=sys.stderr)
        return USAGE
    files = RunFiles(Path(sys.argv[1]).resolve())
    config = RunConfig.model_validate(json.loads(files.config.read_text()))
    _set_environment(config)
    status = Status(files, config.trainer.num_steps)
    # Imported only now: Ray reads its authentication settings when it is imported.
    with uncollected():
        from rlctl_train.driver import drive, explain, plan_of
        from rlctl_train.telemetry.report import write_report
        from rlctl_train.training import StopFlag, Stopped
        from rlctl_train.triage import ran_out, triage

    stop = StopFlag()
    stop.listen()
    try:
        drive(files, config, status, stop)
        status.end("done", OK)
    except Stopped:
        status.end("stopped", INTERRUPTED)
    except KeyboardInterrupt:
        status.end("stopped", INTERRUPTED, UNSAVED)
    except Exception as error:  # the process boundary: whatever went wrong ends in the status file
        traceback.print_exc()
        out_of_memory = ran_out(error)
        problem = triage(error, status, plan_of(files)) if out_of_memory else explain(error)
        kind = {"kind": OUT_OF_MEMORY} if out_of_memory else {}
        status.end("failed", problem.exit_code, {"what": problem.what, "remedy": problem.remedy, **kind})
        print(f"error: {problem.what}\n  -> {problem.remedy}", file=sys.stderr)
    write_report(files)
    return status.exit_code


def _set_environment(config: RunConfig) -> None:
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.ray.to_join(os.environ) is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # A private head never comes back: what has lost it need not wait a minute for it.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code == FAILED else sys.exit(code)
