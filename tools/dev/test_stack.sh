#!/usr/bin/env bash
# Tests the ops and the models with other versions of PyTorch, each in an environment of its own.
#
#   bash tools/dev/test_stack.sh VERSION...     for example 2.1.2 2.4.1; torch has each for some versions of Python
#
# PYTHON is the interpreter (default: python3), STACKS the folder of the environments, which later runs use again
# (default: work_dirs/stacks), and MARKS what pytest's -m gets (default: not slow). Tests of the three libraries are left
# out: the environments have mmengine and mmcv-lite alone.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -eq 0 ]; then
    echo 'usage: bash tools/dev/test_stack.sh VERSION..., such as 2.1.2' >&2
    exit 2
fi
PYTHON=${PYTHON:-python3}
STACKS=$(realpath -m "${STACKS:-work_dirs/stacks}")
MARKS=${MARKS:-not slow}

for version in "$@"; do
    env=$STACKS/torch-$version-$("$PYTHON" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
    numpy=numpy
    case $version in 2.[12].*) numpy='numpy<2' ;; esac  # these were compiled for numpy 1
    requirements=("torch==$version" "$numpy" 'setuptools>=77,<81' wheel ninja pytest pytest-timeout pytest-xdist
        hypothesis mmengine mmcv-lite==2.1.0)
    if [ "$(cat "$env/complete" 2>/dev/null)" != "${requirements[*]}" ]; then
        rm -rf "$env"
        "$PYTHON" -m venv "$env"
        "$env/bin/pip" install --quiet "${requirements[@]}"
        echo "${requirements[*]}" >"$env/complete"
    fi

    # A copy, as the compiled ops lie among the sources.
    rm -rf "$env/source" && mkdir "$env/source"
    git ls-files -z | tar --create --null --files-from - | tar --extract --directory "$env/source"
    (
        cd "$env/source"
        PATH=$env/bin:$PATH MMSPATIALMAMBA_WITH_OPS=1 "$env/bin/python" setup.py --quiet build_ext --inplace
        OMP_NUM_THREADS=1 "$env/bin/python" -m pytest -q -m "$MARKS" -n auto --maxprocesses=4 --dist=loadfile \
            tests/test_ops tests/test_models tests/test_deploy --ignore tests/test_models/test_tta.py \
            --ignore tests/test_models/test_amp.py --ignore tests/test_models/test_large_inputs.py --deselect \
            tests/test_models/test_mm_spatial_mamba.py::test_takes_the_arguments_of_an_inherited_swin_config --deselect \
            tests/test_models/test_spatial_mamba.py::test_class_activation_map_of_the_default_layer
    )
    echo "test_stack: torch $version: passed"
done
