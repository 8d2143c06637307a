#!/bin/sh
# Runs nvcc on paths relative to the build folder, as they end up in the binary, and keeps what it says in <object>.log.
for argument; do
    shift
    set -- "$@" "${argument#"$PWD/"}"
    [ "$previous" = -o ] && log=$argument.log
    previous=$argument
done
"$@" >"$log" 2>&1
status=$?
[ $status = 0 ] || cat "$log" >&2
exit $status
