#!/bin/sh
# usage: one_owner.sh NM ARCHIVE
#
# Fails where a function of kernels_<instruction set>.cpp has the same symbol in another object: the linker keeps one of
# them, whatever it was compiled for, and a processor could meet instructions that it lacks. (A template that two
# instruction sets instantiate must have their vector type among its arguments.) Meant for optimized objects: others
# share trivial functions that are inlined here.
symbols=$("$1" -A --defined-only "$2") || exit
shared=$(printf '%s\n' "$symbols" | awk '
  $(NF - 1) ~ /[Wu]/ {
    if ($0 ~ /:kernels_/) kernels[$NF]
    if ($NF in seen) twice[$NF]
    seen[$NF]
  }
  END { for (symbol in twice) if (symbol in kernels) print "  " symbol }')
if [ -n "$shared" ]; then
  printf 'csrc/core: functions that are compiled for several instruction sets under one symbol:\n%s\n' "$shared" >&2
  exit 1
fi
