# shellcheck shell=bash
# Sourced by the scripts beside it. `ensure_env [EXTRA...]` leaves a .venv in which the package is installed with these
# extras. All the work is done by env.py (standard library only); here we only look for a Python that can run it.
# Bash 3.2 is enough (macOS).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Used by the scripts that source this file.
# shellcheck disable=SC2034
python=$root/.venv/bin/python

# Prints the first usable Python; 3.11 first, because that is what the tests run on most.
find_python() {
    local candidate rc without_venv=""
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        rc=0
        "$candidate" -I -c '
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(3)
try:
    import venv, ensurepip
except ImportError:
    sys.exit(4)' >/dev/null 2>&1 || rc=$?
        case $rc in
            0) command -v "$candidate" && return 0 ;;
            4) without_venv=${without_venv:-$candidate} ;;
        esac
    done
    if [[ -n $without_venv ]]; then
        echo "error: $without_venv has no venv module; install it (Debian, Ubuntu: apt install python3-venv) and run this again" >&2
    else
        echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    fi
    return 1
}

ensure_env() {
    # A .venv whose Python is gone or damaged fails this first command, whatever the reason, and is made anew.
    if [[ -x $root/.venv/bin/python ]] && "$root/.venv/bin/python" -I -S "$root/scripts/env.py" is-ready "$@" 2>/dev/null; then
        return 0
    fi
    local found
    found=$(find_python) || return 1
    "$found" -I "$root/scripts/env.py" install "$@"
}
