# What follows is the same for every run. `main` runs once, on the first node; it starts this file again on every node
# as `job.sbatch node ROLE NUMBER`, to be one node of the Ray cluster, and a container starts it as `job.sbatch inside ...`.

LOST_GRACE_S=60      # how long the driver has to notice by itself that a node of Ray is gone
STOP_GRACE_S=15      # how long Ray's nodes have to leave

say() { echo "rlctl: $*"; }

# The address on launch.network_interface, else the one by which another node (of that address) is reached.
own_address() {  # [OTHER]
    local found=
    if [ -n "$INTERFACE" ]; then
        ip -4 -o addr show dev "$INTERFACE" | awk '{split($4, part, "/"); print part[1]; exit}'
        return
    fi
    [ -z "${1:-}" ] || found=$(ip -4 route get "$1" 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
    case $found in 127.*) found= ;; esac
    echo "${found:-$(hostname -I | awk '{print $1}')}"
}

address_of() { getent ahostsv4 "$1" | awk '{print $1; exit}'; }  # HOST

# A worker of Ray that comes before the head would give up.
await_head() {
    local since=$SECONDS
    until (exec 3<>"/dev/tcp/$HEAD_IP/$HEAD_PORT") 2>/dev/null; do
        [ $((SECONDS - since)) -lt "$START_TIMEOUT_S" ] || { say "no Ray head at $HEAD_IP:$HEAD_PORT"; exit 5; }
        sleep 0.5
    done
}

ray_node() {  # ROLE NUMBER
    local place=()
    prepare_node || exit 5
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # by then nothing is left to wait for
    if [ "$1" = head ]; then
        place=(--head --node-ip-address="$HEAD_IP" --port="$HEAD_PORT" --ray-client-server-port=$((HEAD_PORT + 1))
            --include-dashboard=false --temp-dir="$SCRATCH")
    else
        place=(--address="$HEAD_IP:$HEAD_PORT" --node-ip-address="$(own_address "$HEAD_IP")")
    fi
    enter "$1" "$2" -m ray.scripts.scripts start "${place[@]}" "${RAY_NODE[@]}" --node-name="$SLURMD_NODENAME" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats --block
}

start_node() {  # ROLE NUMBER
    local host=${HOSTS[$2]}
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$host" --cpus-per-task="$CPUS" \
        --output="${RUN//%/%%}/logs/ray-$host.log" --open-mode=append bash "$RUN/launch/job.sbatch" node "$1" "$2" &
    STEPS[$host]=$!
}

start_driver() {
    (prepare_node || exit 5; enter driver 0 -m rlctl_train "$RUN") &
    DRIVER=$!
    [ -z "$SAVE$STOP" ] || ask_to_save
}

# The driver saves and leaves at the first signal, and leaves at once at the second: only a person gives a second one.
ask_to_save() {
    [ -n "$DRIVER" ] && [ -z "$ASKED" ] || return
    ASKED=1
    kill -TERM "$DRIVER" 2>/dev/null
}

on_limit_or_preemption() { say "told to make room: saving"; SAVE=1; ask_to_save; }
on_stop() { [ -z "$STOP" ] || kill -TERM "$DRIVER" 2>/dev/null; STOP=1; ask_to_save; }
on_end() { STOP=1; }  # Slurm ends the job, and sends the driver the same signal itself

# Sets CODE to the driver's exit code; to 5 where a node of Ray went first and the driver did not notice, and to 4 where
# a node is not as planned.
watch_driver() {
    local host lost= since=0 left=0
    while kill -0 "$DRIVER" 2>/dev/null; do
        for host in "${HOSTS[@]}"; do
            [ -n "$lost" ] || kill -0 "${STEPS[$host]}" 2>/dev/null || {
                lost=$host since=$SECONDS
                say "Ray on $host has ended; its last lines, from logs/ray-$host.log:"
                tail -n 5 "$RUN/logs/ray-$host.log"
                wait "${STEPS[$host]}"; left=$?
            }
        done
        if [ "$left" -eq 4 ] || { [ -n "$lost" ] && [ $((SECONDS - since)) -ge "$LOST_GRACE_S" ]; }; then
            kill -KILL "$DRIVER" 2>/dev/null
        fi
        sleep 1 & wait $!
    done
    wait "$DRIVER"; CODE=$?
    [ "$CODE" -ne 137 ] || [ -z "$lost" ] || CODE=$((left == 4 ? 4 : 5))
}

stop_nodes() {  # HOST...: as srun passes the signal on, Ray ends what it started there
    local host deadline=$((SECONDS + STOP_GRACE_S))
    for host; do kill -TERM "${STEPS[$host]}" 2>/dev/null; done
    for host; do
        while kill -0 "${STEPS[$host]}" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
        kill -KILL "${STEPS[$host]}" 2>/dev/null
    done
}

# Ends the job with CODE, or sends it back to the queue. Losses are counted in the run folder, a line each: Slurm's own
# count of restarts also has preemptions, which are no faults.
leave() {
    local losses="$RUN/launch/losses-$SLURM_JOB_ID" lost=0
    case $CODE in 0 | 130 | 143) timeout 20 srun --overlap --ntasks-per-node=1 rm -rf "$SCRATCH" ;; esac
    [ -z "$STOP" ] || exit "$CODE"
    case $CODE in
        0 | 2 | 3 | 4) exit "$CODE" ;;
        130 | 143) [ -n "$SAVE" ] || exit "$CODE"; requeue "saved to make room" ;;
    esac
    [ ! -f "$losses" ] || lost=$(wc -l < "$losses")
    say "the driver ended with code $CODE; restarts so far: $lost of launch.max_restarts=$MAX_RESTARTS;" \
        "Ray's own logs stay in $SCRATCH on each node"
    [ "$lost" -lt "$MAX_RESTARTS" ] || exit "$CODE"
    echo "$(date +%FT%T) $CODE" >> "$losses"
    requeue "back to the last checkpoint"
}

requeue() {  # WHY
    say "$1: the job queues again"
    trap '' TERM USR1 USR2
    timeout 30 scontrol requeue "$SLURM_JOB_ID" || say "Slurm did not take it: continue with \`rlctl runs resume\`"
    exit "$CODE"
}

main() {
    declare -A STEPS=()
    SAVE= STOP= ASKED= DRIVER= CODE=5
    trap on_limit_or_preemption USR1
    trap on_stop USR2
    trap on_end TERM
    mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    HEAD_IP=$(own_address "$(address_of "${HOSTS[-1]}")")
    # Of this job alone, and another one at every start: the last may still be taken.
    HEAD_PORT=$((20000 + (SLURM_JOB_ID + 37 * ${SLURM_RESTART_COUNT:-0}) % 5000 * 2))
    SCRATCH=/tmp/rlctl-ray-$SLURM_JOB_ID
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    RLCTL_RAY_ADDRESS=$HEAD_IP:$HEAD_PORT RLCTL_RAY_NODES=$(IFS=,; echo "${HOSTS[*]}")
    export HEAD_IP HEAD_PORT SCRATCH RAY_AUTH_MODE RAY_AUTH_TOKEN RLCTL_RAY_ADDRESS RLCTL_RAY_NODES
    [ -n "$HEAD_IP" ] || { say "$HOSTNAME has no address${INTERFACE:+ on launch.network_interface=$INTERFACE}"; leave; }
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${HOSTS[*]}; Ray at $RLCTL_RAY_ADDRESS"
    start_node head 0
    for ((number = 1; number < ${#HOSTS[@]}; number++)); do start_node worker "$number"; done
    start_driver
    watch_driver
    stop_nodes "${HOSTS[@]:1}"
    stop_nodes "${HOSTS[0]}"
    leave
}

case ${1:-} in
    node) ray_node "$2" "$3" ;;
    inside) shift; inside "$@" ;;
    *) main ;;
esac
