#!/usr/bin/env bash
# The documentation site into build/site: pages that are made from the code, then mkdocs, whose warnings are errors.
# bash tools/docs.sh --serve shows it while it is written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh docs
python tools/docs_pages.py >/dev/null
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = --serve ]; then
    exec python -m mkdocs serve
fi
exec python -m mkdocs build --strict
