#!/bin/sh
# Installs into a virtual environment at the locked versions; run in an image's build, in the build context.
#
#   install.sh dependencies FOLDER EXTRA…    what the product needs for these extras
#   install.sh product FOLDER                the product itself
#
# Wheels that lie in the build context are used instead of a package index.
set -eu

verb=$1
folder=$2
shift 2
pip="python3 -m pip"
index=""
if ls ./*.whl >/dev/null 2>&1; then
    pip="python3 $(ls "$PWD"/pip-*.whl)/pip"
    index="--no-index --find-links $PWD"
fi
export UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
uv="$PWD/tools/bin/uv"

case $verb in
dependencies)
    # shellcheck disable=SC2086
    $pip install -q --no-cache-dir $index --target tools uv
    python3 -m venv --without-pip "$folder"
    extras=""
    for extra in "$@"; do extras="$extras --extra $extra"; done
    # shellcheck disable=SC2086
    "$uv" pip install -q $index --python "$folder" --constraint requirements.lock -r pyproject.toml $extras
    ;;
product)
    # shellcheck disable=SC2086
    "$uv" pip install -q $index --python "$folder" --no-deps .
    ;;
esac
