#!/usr/bin/env bash
# The first line of `make test`: what it is about to install on the system, if anything.
set -euo pipefail

packages=$(for tests in slurm browser; do bash "scripts/setup_${tests}_test.sh" --plan; done | xargs)
[ -z "$packages" ] || echo "make test: you are root, so apt-get will install what is missing of $packages" \
    "(for tests/cluster and tests/track; where that fails, these tests are skipped)"
