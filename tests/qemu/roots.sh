#!/usr/bin/env bash
# QEMU 10.0 and 11.1 beside the installed one: each in a Debian root of its own, DIR/10.0 (trixie) and DIR/11.1 (its backports).
#
#   roots.sh [DIR]     DIR: else $TRIMIG_QEMU_ROOTS, else /var/tmp/trimig-qemu
#
# Run it as root or with sudo, on a Debian. It takes about two minutes and 1.5 GiB. Finished roots are kept, so the
# script can be run again, also after an interruption. The tests start a QEMU of a root without chroot (tests/qemu/installed.py).
# The root 10.0 has a Python 3.13 as well, for the tests of TLS with PSK (tests/qemu/root_python.sh).
set -euo pipefail
readonly where=${1:-${TRIMIG_QEMU_ROOTS:-/var/tmp/trimig-qemu}}
readonly qemu=usr/bin/qemu-system-x86_64
# An archive that is a snapshot has lists whose time has run out.
readonly apt="apt-get -q -o Acquire::Check-Valid-Until=false -o Acquire::Retries=5"

if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "roots.sh: run it as root; there is no sudo" >&2; exit 1; }
    exec sudo -n --preserve-env=http_proxy,https_proxy,no_proxy "$0" "$where"
fi

# Networks fail now and then: three attempts, with a pause.
try() {
    local attempt
    for attempt in 1 2 3; do
        "$@" && return
        echo "roots.sh: attempt $attempt of 3 failed: $*" >&2
        sleep $((attempt * 5))
    done
    return 1
}

# The addresses in apt's sources, of both forms of file; the first one counts.
mirrors() {
    shopt -s nullglob
    local files=(/etc/apt/sources.list.d/*.sources)
    [ ${#files[@]} = 0 ] || sed -n 's/^URIs: *\([^ ]*\).*/\1/p' "${files[@]}"
    files=(/etc/apt/sources.lis[t] /etc/apt/sources.list.d/*.list)
    [ ${#files[@]} = 0 ] || sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' "${files[@]}"
}

install_in() {
    chroot "$1" env DEBIAN_FRONTEND=noninteractive sh -c "$apt update && $apt -y install --no-install-recommends $2 && apt-get clean"
}

bootstrap() {
    rm -rf "$1"
    debootstrap --variant=minbase trixie "$1" "$mirror"
}

make_first() {
    try bootstrap "$where/part"
    try install_in "$where/part" "qemu-system-x86 python3"
    rm -rf "$where/10.0"
    mv "$where/part" "$where/10.0"
}

make_second() {
    rm -rf "$where/part"
    cp -a "$where/10.0" "$where/part"
    echo "deb $mirror trixie-backports main" >"$where/part/etc/apt/sources.list.d/backports.list"
    try install_in "$where/part" "-t trixie-backports qemu-system-x86"
    rm -rf "$where/11.1"
    mv "$where/part" "$where/11.1"
}

# Runs one of the functions above; what it prints goes to a file, whose end is shown if it fails.
logged() {
    local name=$1
    shift
    # In a shell of its own: "set -e" has no effect in a function that is a condition.
    export -f "$@" try install_in bootstrap
    export where mirror apt
    bash -euo pipefail -c "$*" >"$where/$name.log" 2>&1 && return
    tail -n 20 "$where/$name.log" >&2
    echo "roots.sh: the root $name could not be made; all that was said is in $where/$name.log" >&2
    exit 1
}

mkdir -p "$where"
exec 9>"$where/.lock"
flock 9 # two at once would be in each other's way
mirror=$(mirrors)
mirror=${mirror%%$'\n'*}
[ -n "$mirror" ] || { echo "roots.sh: apt's sources name no mirror of Debian" >&2; exit 1; }
readonly mirror
if ! command -v debootstrap >/dev/null; then
    try $apt update
    try env DEBIAN_FRONTEND=noninteractive $apt -y install --no-install-recommends debootstrap
fi >/dev/null
python() { try install_in "$where/10.0" python3; }
[ -x "$where/10.0/$qemu" ] || logged 10.0 make_first
[ -e "$where/10.0/usr/bin/python3" ] || logged python python
[ -x "$where/11.1/$qemu" ] || logged 11.1 make_second
for version in 10.0 11.1; do
    chroot "$where/$version" qemu-system-x86_64 --version | head -n 1
done
