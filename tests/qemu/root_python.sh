#!/usr/bin/env bash
# A Python 3.13 or newer for the tests of TLS with PSK, which Python's ssl has from 3.13 on: prints its path.
#
#   root_python.sh [DIR]     DIR: where roots.sh has made its roots; else $TRIMIG_QEMU_ROOTS, else /var/tmp/trimig-qemu
#
# It is one of the path, if there is one, else that of the root 10.0. The latter is a small script in that root, which starts
# the interpreter by the root's own loader and libraries: it works outside of the root, also in virtual environments.
set -euo pipefail
readonly where=${1:-${TRIMIG_QEMU_ROOTS:-/var/tmp/trimig-qemu}}

for name in python3 python3.13 python3.14 python3.15; do
    # A name may exist and still not run (a version manager's stub), so each is tried.
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 13))' 2>/dev/null; then
        command -v "$name"
        exit
    fi
done

readonly root=$where/10.0
real=$(find "$root/usr/bin" -name 'python3.1[3-9]' -type f | head -n 1)
[ -n "$real" ] || { echo "root_python.sh: no Python 3.13 on the path or in $root (tests/qemu/roots.sh makes it)" >&2; exit 1; }
loader=$(find "$root/usr/lib" -name 'ld-linux-*.so.*' | head -n 1)
libraries=$(find "$root/usr/lib" -maxdepth 1 -name '*-linux-gnu' | head -n 1)
# In this directory, so that the interpreter finds its own library beside it.
script=$root/usr/bin/outside-$(basename "$real")
if [ ! -e "$script" ]; then
    # The name by which it is called stays, since a virtual environment is known by it.
    part=$(mktemp)
    printf '#!/bin/sh\nexec "%s" --library-path "%s:%s/usr/lib" --argv0 "$0" "%s" "$@"\n' \
        "$loader" "$libraries" "$root" "$real" >"$part"
    chmod 755 "$part"
    if [ -w "$root/usr/bin" ]; then mv "$part" "$script"; else sudo -n mv "$part" "$script"; fi
fi
"$script" -c 'import ssl, sys; sys.exit(not hasattr(ssl.SSLContext, "set_psk_client_callback"))' ||
    { echo "root_python.sh: $script does not run, or has no PSK" >&2; exit 1; }
echo "$script"
