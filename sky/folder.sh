# The run folder: on this machine's disk, under the same path on every node. What must survive is in $RLCTL_BUCKET:
# checkpoints are written there at once, everything else is copied as it grows.
set -euo pipefail
set +m # SkyPilot's shell has job control, which would make each process below a group that it leads
run=$HOME/rlctl-runs/$RLCTL_RUN
kept=${RLCTL_BUCKET:+${RLCTL_BUCKET/#\~/$HOME}/$RLCTL_RUN}
rank=${SKYPILOT_NODE_RANK:-0}
export PATH="$(dirname "$(command -v "$python")"):$PATH"
mkdir -p "$run/logs" "$HOME/rlctl-work"
cd "$HOME/rlctl-work" # relative paths of the configuration are meant from here, by Ray's workers too

restore() {
    [ -n "$kept" ] || return 0
    mkdir -p "$kept/checkpoints"
    ln -sfn "$kept/checkpoints" "$run/checkpoints"
    [ "$rank" = 0 ] || return 0
    for item in "$kept"/*; do
        case ${item##*/} in checkpoints | losses | config.json | plan.json | origin.json) ;; *) cp -ru "$item" "$run/" ;; esac
    done
}

keep() {
    [ -n "$kept" ] || return 0
    for item in "$run"/*; do
        [ "${item##*/}" = checkpoints ] || cp -ru "$item" "$kept/"
    done
}

# Ends this node with a code. What may go better elsewhere ends a managed job with 75, on which SkyPilot starts it again;
# the bucket counts how often, for machines that were taken back are no faults. Codes 2 to 4 would only come again.
leave() { # CODE
    local losses=$kept/losses/$(basename "$SKYPILOT_TASK_ID")
    case $1 in 0 | 2 | 3 | 4 | 130 | 143) exit "$1" ;; esac
    [ -n "${RLCTL_MAX_RESTARTS:-}" ] && [ -n "$kept" ] || exit "$1"
    mkdir -p "$losses"
    [ "$(find "$losses" -type f | wc -l)" -lt "$RLCTL_MAX_RESTARTS" ] || exit "$1"
    echo "node $rank ended with code $1" >"$losses/$(date +%Y%m%dT%H%M%S.%N)-$rank"
    exit 75
}

relay_status() { [ ! -f "$run/status.json" ] || echo "rlctl::status $(tr -d '\n' <"$run/status.json")"; }

restore
