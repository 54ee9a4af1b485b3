# The driver, on the first node. Its output, the run's metrics and its status go to the job's log, from where `rlctl runs`
# reads them. The file $stop, or SIGTERM, asks it to save and leave.
stop=/tmp/rlctl-stop-$(id -u)-$RLCTL_RUN
rm -f "$stop"
printed=$(stat -c %s "$run/logs/driver.log" 2>/dev/null || echo 0)
# Not through a pipe: the driver must outlive whoever reads along.
"$python" -m rlctl_train "$run" >>"$run/logs/driver.log" 2>&1 &
driver=$!
trap 'kill -TERM $driver 2>/dev/null || true' TERM INT
tail -c +$((printed + 1)) -F --pid=$driver "$run/logs/driver.log" 2>/dev/null &
tail -n +1 -F --pid=$driver "$run/metrics.jsonl" 2>/dev/null | sed -u 's/^/rlctl::metrics /' &
said='' kept_at=$SECONDS
while kill -0 $driver 2>/dev/null; do
    sleep 1
    [ ! -e "$stop" ] || { rm -f "$stop"; kill -TERM $driver 2>/dev/null || true; }
    new=$(relay_status)
    [ "$new" = "$said" ] || { said=$new; echo "$new"; }
    [ $((SECONDS - kept_at)) -lt "${RLCTL_KEEP_S:-60}" ] || { keep; kept_at=$SECONDS; }
done
code=0
wait $driver || code=$?
sleep 2 # the last lines of the two tails
[ ! -f "$run/summary.json" ] || echo "rlctl::summary $(tr -d '\n' <"$run/summary.json")"
relay_status
keep
leave $code
