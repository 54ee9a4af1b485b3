# Our Ray: its own port from the job's id, its own folder, the token in $RAY_AUTH_TOKEN; other Rays are left alone.
nodes=$(wc -l <<<"$SKYPILOT_NODE_IPS")
head=$(head -n1 <<<"$SKYPILOT_NODE_IPS")
own=$(sed -n "$((rank + 1))p" <<<"$SKYPILOT_NODE_IPS")
port=$((20000 + $(cksum <<<"$SKYPILOT_TASK_ID" | cut -d' ' -f1) % 10000))
deadline=$((SECONDS + 900))
export RAY_AUTH_MODE=token RAY_TMPDIR=/tmp/rlctl-ray-$port RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
unset RAY_ADDRESS

head_listens() { (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; }

start_ray() {
    setsid ray start "$@" --node-ip-address="$own" --temp-dir="$RAY_TMPDIR" --num-gpus="$RLCTL_GPUS" \
        ${RLCTL_CPUS:+--num-cpus="$RLCTL_CPUS"} ${RLCTL_STORE:+--object-store-memory="$RLCTL_STORE"} \
        --dashboard-agent-listen-port=$((port + 2 + rank)) --disable-usage-stats --block >"$run/logs/ray-$rank.log" 2>&1 &
    ray_pid=$!
    trap stop_ray EXIT
}

stop_ray() {
    local code=$?
    kill -TERM "$ray_pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$ray_pid" 2>/dev/null || break; sleep 0.2; done
    kill -KILL -- "-$ray_pid" 2>/dev/null || true
    [ $code != 0 ] || rm -rf "$RAY_TMPDIR" # after a failure its logs are worth reading
}

if [ "$rank" != 0 ]; then
    until head_listens; do
        [ $SECONDS -lt $deadline ] || { echo "node $rank: no Ray at $head:$port in time" >&2; leave 5; }
        sleep 1
    done
    start_ray --address="$head:$port"
    while head_listens && kill -0 "$ray_pid" 2>/dev/null; do sleep 5; done
    ! head_listens || { echo "node $rank: Ray is gone, see logs/ray-$rank.log" >&2; leave 5; }
    exit 0
fi
mkdir -p "$RAY_TMPDIR"
start_ray --head --port="$port" --ray-client-server-port=$((port + 1)) --include-dashboard=false
export RLCTL_RAY_ADDRESS=$head:$port
"$python" - "$RLCTL_RAY_ADDRESS" "$nodes" "$((deadline - SECONDS))" <<'PYTHON'
import socket, sys, time
address, nodes, seconds = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
while True:
    try:
        socket.create_connection(address.rsplit(":", 1), 5).close()
        break
    except OSError:
        if time.monotonic() > seconds:
            sys.exit(f"Ray did not start at {address} in time, see logs/ray-0.log")
        time.sleep(0.5)
import ray
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > seconds:
        sys.exit(f"only {alive} of {nodes} nodes joined Ray in time")
    time.sleep(1)
PYTHON
