# Sourced by run.sh, test.sh and docs.sh: makes .venv from the lock when it is missing or out of date.
# Usage: . tools/env.sh [EXTRA]     (dev: linters, type checker, pytest, site; docs: the site alone)
# PYTHON=python3.12 picks the interpreter; uv is used when it is on the PATH, pip otherwise.

wanted=${1:-run}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/.installed-$wanted"

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "tools/env.sh: no Python >= 3.11 with venv on the PATH; install one or set PYTHON=/path/to/python" >&2
    return 1
}

install() {
    local tool=(python -m pip)
    if command -v uv >/dev/null 2>&1; then tool=(uv pip); fi
    local what="$root"
    if [ "$wanted" != run ]; then what="$root[$wanted]"; fi
    "${tool[@]}" install --quiet -c "$root/tools/constraints.txt" -e "$what"
}

if [ ! -x "$venv/bin/python" ]; then
    python_bin=$(find_python) || exit 1
    "$python_bin" -m venv "$venv" || exit 1
fi
# shellcheck disable=SC1091
. "$venv/bin/activate"
fingerprint=$(cat "$root/pyproject.toml" "$root/tools/constraints.txt" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
    echo "Installing the locked dependencies into .venv (a minute or two, 1.3 GB) ..."
    install || { echo "tools/env.sh: the installation failed; see the lines above" >&2; exit 1; }
    echo "$fingerprint" >"$stamp"
fi
