# The doctor compares this node with the plan before it costs more; its report goes to the job's log, code 4 ends the job.
[ -e "$run/status.json" ] || echo '{"schema_version": 1, "state": "pending", "phase": "setup", "step": 0}' >"$run/status.json"
examined=0
timeout -k 10 300 "$python" -m rlctl.app doctor --run "$run" --node "$rank" || examined=$?
[ ! -e "$run/doctor/node-$rank.json" ] || echo "rlctl::doctor $(tr -d '\n' <"$run/doctor/node-$rank.json")"
[ $examined = 0 ] || { relay_status; exit $examined; }
