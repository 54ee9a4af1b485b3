# The driver, on the first node. Its output, the run's metrics and its status go to the job's log, from where `rlctl runs`
# reads them. The file $stop, or SIGTERM, asks it to save and leave, the file $stacks where everyone is.
stop=/tmp/rlctl-stop-$(id -u)-$RLCTL_RUN stacks=/tmp/rlctl-stacks-$(id -u)-$RLCTL_RUN
rm -f "$stop" "$stacks"
send() { "$python" -m rlctl_train.courier lines "$run" "$@" || true; }
printed=$(stat -c %s "$run/logs/driver.log" 2>/dev/null || echo 0)
# Not through a pipe: the driver must outlive whoever reads along.
"$python" -m rlctl_train "$run" >>"$run/logs/driver.log" 2>&1 &
driver=$!
trap 'kill -TERM $driver 2>/dev/null || true' TERM INT
tail -c +$((printed + 1)) -F --pid=$driver "$run/logs/driver.log" 2>/dev/null &
tail -n +1 -F --pid=$driver "$run/metrics.jsonl" 2>/dev/null | sed -u 's/^/rlctl::metrics /' &
said='' asked='' kept_at=$SECONDS
while kill -0 $driver 2>/dev/null; do
    sleep 1
    [ ! -e "$stop" ] || { rm -f "$stop"; kill -TERM $driver 2>/dev/null || true; }
    [ ! -e "$stacks" ] || { rm -f "$stacks"; asked=1; touch "$run/logs/stacks.wanted"; }
    [ -z "$asked" ] || [ -e "$run/logs/stacks.wanted" ] || { asked=''; send 'logs/stacks-*.txt'; }
    new=$(relay_status)
    [ "$new" = "$said" ] || { said=$new; echo "$new"; }
    [ $((SECONDS - kept_at)) -lt "${RLCTL_KEEP_S:-60}" ] || { keep; kept_at=$SECONDS; }
done
code=0
wait $driver || code=$?
sleep 2 # the last lines of the two tails
[ ! -d "$run/profile" ] || send 'profile/**/*'
[ ! -f "$run/summary.json" ] || echo "rlctl::summary $(tr -d '\n' <"$run/summary.json")"
relay_status
keep
leave $code
