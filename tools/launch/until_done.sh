#!/usr/bin/env bash
# Runs a training command, and tells by the exit status whether it is to be run again.
#
#   tools/launch/until_done.sh [--dry_run] COMMAND...
#
# mdt_jax.train exits 0 when it has trained to the end, and also when it was asked to stop (SIGTERM,
# SIGUSR1, --max_hours) and has saved. Here the second is status 75, EX_TEMPFAIL: schedulers run a
# job again by its status. The other statuses are the command's own. Signals are passed on to it.
set -u

if [[ ${1-} == --dry_run ]]; then
  shift
  printf '%q ' "$@"
  echo
  exit 0
fi
if (($# == 0)) || [[ $1 == --help ]]; then
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A scheduler may signal every process of a job, and the log must outlive the command.
exec {copied}> >(trap '' INT TERM USR1 && exec tee "$log" >&2)
copier=$!
command='' asked=''
pass_on() {
  asked=$1
  [[ ! $command ]] || kill -s "$asked" "$command" 2>/dev/null
}
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064  # the signal of this turn
  trap "pass_on $signal" "$signal"
done
"$@" 2>&"$copied" &
command=$!
exec {copied}>&-
[[ ! $asked ]] || pass_on "$asked" # it came before there was a command

wait "$command"
status=$?
# `wait` also returns above 128 when a signal came to this shell.
while ((status > 128)) && kill -0 "$command" 2>/dev/null; do
  wait "$command"
  status=$?
done
wait "$copier"
if ((status == 0)) && grep -qE 'stopped at step|stopping before the first step' "$log"; then
  echo "$1: stopped before its end, saved; run it again (status 75)" >&2
  exit 75
fi
exit "$status"
