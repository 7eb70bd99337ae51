# shellcheck shell=bash
# Sourced by the scripts before they do anything: with --help or -h they print the comment at their top, and end.
print_comment() { # print_comment FILE PATTERN: the comment at the top of a file, from the line with the pattern on
  awk -v from="$2" 'NR > 1 { if (!/^#/) exit; if ($0 ~ from) on = 1; if (on) { sub(/^# ?/, ""); print } }' "$1"
}
for word in "$@"; do
  [[ "$word" == --help || "$word" == -h ]] || continue
  print_comment "$0" .
  if [[ "${BASH_SOURCE[1]}" == */launch.sh ]]; then
    printf '\nFlags after the name of a launch script override its own; all of them: run_glue.py --help.\n'
    print_comment "${BASH_SOURCE[1]}" "What a user may set"
  fi
  exit 0
done
