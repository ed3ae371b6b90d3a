#!/usr/bin/env bash
# vaedist for compute nodes that cannot reach the internet: wheels are fetched on the login node, installed without it.
#     bash cluster/environment.sh fetch WHEELS [PROJECT]   on the login node: wheels of vaedist and all it needs
#     bash cluster/environment.sh install WHEELS VENV      anywhere, without internet: a virtual environment from them
#     bash cluster/environment.sh check VENV               on a compute node: does everything load?
# WHEELS and VENV are folders on the shared disk; PROJECT is the folder of vaedist's source (default: the current one).
# $PYTHON is the interpreter (default: python3); it must be the same version on login and compute nodes. For another
# build of torch than the default one, tell pip where: export PIP_EXTRA_INDEX_URL=...
set -euo pipefail

usage() {
    sed -n '3,5s/^# *//p' "$0" >&2
    exit 2
}

task=${1-}
python=${PYTHON:-python3}
case "$task" in
fetch)
    [ $# -ge 2 ] || usage
    wheels=$2 project=${3:-.}
    [ -f "$project/pyproject.toml" ] || { echo "there is no source of vaedist in $project: give its folder" >&2; exit 2; }
    mkdir -p "$wheels"
    # The pinned set that the tests ran with; built packages only, so that no compiler is needed later. The wheel is
    # built here: a node without internet could not fetch hatchling for it.
    rm -f "$wheels"/vaedist-*.whl # of another version
    "$python" -m pip wheel --no-deps --wheel-dir "$wheels" "$project"
    "$python" -m pip download --only-binary=:all: --constraint "$project/constraints.txt" \
        --dest "$wheels" "$wheels"/vaedist-*.whl
    cp "$project/constraints.txt" "$wheels/"
    "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' >"$wheels/python-version"
    echo "next, on any node: bash cluster/environment.sh install $wheels VENV"
    ;;
install)
    [ $# -eq 3 ] || usage
    wheels=$2 venv=$3
    here=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    for_version=$(cat "$wheels/python-version" 2>/dev/null || echo unknown)
    if [ "$here" != "$for_version" ]; then
        echo "these wheels are for Python $for_version and $python is $here: set PYTHON, or fetch them again" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-index --find-links "$wheels" \
        --constraint "$wheels/constraints.txt" vaedist
    echo "installed. In your site file:    setup: ['source $(realpath "$venv")/bin/activate']"
    echo "next, on a compute node:         srun bash cluster/environment.sh check $venv"
    ;;
check)
    [ $# -eq 2 ] || usage
    "$2/bin/python" -c 'import torch, ray, vaedist; print("vaedist", vaedist.__version__, "torch", torch.__version__,
    "ray", ray.__version__, "GPUs", torch.cuda.device_count())'
    ;;
*) usage ;;
esac
