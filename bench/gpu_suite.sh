#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU, in one command and under nine minutes: install, GPU tests, benchmarks, charts.
#
#   bench/gpu_suite.sh OUTDIR              all of it; the tests are stopped after two minutes
#   bench/gpu_suite.sh OUTDIR tests        the tests alone, seven minutes at most: on a new machine every kernel compiles
#   bench/gpu_suite.sh OUTDIR bench        the benchmarks and charts alone
#   bench/gpu_suite.sh OUTDIR models       whole vision transformers, six minutes; needs timm, open_clip_torch, transformers
#
# Needs a python3 with its own torch, Triton, pytest, hypothesis, matplotlib, numpy, tqdm, setuptools, pybind11, ninja.
# No network, and the environment's torch is left alone. Leaves in OUTDIR:
#   report.txt    what every stage printed      junit.xml  the GPU tests
#   versions.txt  driver, torch, Triton         rows.json  benchmark rows; chart.png and table.md made of them
#   stop.json     rows of STOP's tower; stop.png and stop.md made of them
#   fused.json    rows of merge_norm and attention
#   models.json   with `models`: rows of whole vision transformers; models.png and models.md made of them
# A stage that fails does not stop the next ones; the exit status is 1 if any failed. BENCH_COMMIT=<hash> names the
# commit in the rows where the checkout has no .git.
set -uo pipefail

what=${2:-all}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [[ ! $what =~ ^(all|tests|bench|models)$ ]]; then
    echo "usage: $0 OUTDIR [tests|bench|models]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
report=$out/report.txt
: >"$report"
summary=() failed=0
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
# from here on: not the checkout, whose source tree would hide the installed package
cd "$work" || exit 2

stage() { # stage NAME SECONDS COMMAND...: SIGINT first, at which the benchmark still writes what it has
    local name=$1 limit=$2 start=$SECONDS status verdict
    shift 2
    printf '\n===== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$report"
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee -a "$report"
    status=${PIPESTATUS[0]}
    case $status in
    0) verdict=ok ;;
    124 | 137) verdict="stopped at its time limit" failed=1 ;;
    *) verdict="FAILED ($status)" failed=1 ;;
    esac
    summary+=("$(printf '%-16s %-28s %4d s' "$name" "$verdict" $((SECONDS - start)))")
}

versions() {
    nvidia-smi
    python3 - <<'PYTHON'
import importlib.metadata as m, platform, torch

print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "matplotlib", "pytest", "hypothesis", "pybind11", "ninja", "setuptools"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "missing")
print("cuda", torch.version.cuda, "device", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PYTHON
}

install() { # into a folder of its own: a venv of a venv would not see the torch of its parent
    mkdir -p source && cp -r "$root"/{pyproject.toml,setup.py,README.md,LICENSE,stoptome_kernels,python_ref,csrc} source/
    rm -f source/stoptome_kernels/*.so # built elsewhere, perhaps for another Python
    local pip=(python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile)
    if ! "${pip[@]}" --target site ./source; then
        echo "pip could not install it; the Python files alone are copied, the native backend stays out"
        rm -rf site && mkdir site && cp -r source/stoptome_kernels site/
        cp -r source/python_ref site/stoptome_kernels/reference
    fi
    PYTHONPATH=$work/site python3 -c '
import stoptome_kernels as stk
print(stk.__file__, stk.backends())
assert stk.backends()["triton"] is None, "the Triton backend can not run here"'
}

export -f versions install
export root work
stage versions 30 bash -c versions
sed -n '/===== versions/,$p' "$report" >"$out/versions.txt"
stage install 80 bash -c install
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}

# warnings of another torch's or Triton's are no failures; kernels of many shapes compile on as many cores as there are
pytest=(python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -W default
    --ignore-glob "*/test_retrieval_*" --ignore-glob "*/test_vit*") # they need packages that such a machine may lack
python3 -c 'import xdist' 2>/dev/null && pytest+=(-n 8)
[ "$what" = all ] && for_tests=120 || for_tests=420
[[ $what =~ ^(bench|models)$ ]] || stage tests "$for_tests" "${pytest[@]}" -m "not slow" -k "triton or test_gpu" --junitxml "$out/junit.xml" "$root/tests"
benchmarks() {
    commit=(${BENCH_COMMIT:+--commit "$BENCH_COMMIT"})
    bench=(python3 "$root/bench/merge.py" --json "$out/rows.json" --seconds 25 "${commit[@]}")
    stage bench-bfloat16 95 "${bench[@]}" --dtype bfloat16
    stage bench-float32 55 "${bench[@]}" --dtype float32 --no-compile
    stop=(python3 "$root/bench/stop.py" --json "$out/stop.json" --seconds 6 "${commit[@]}")
    stage stop-training 60 "${stop[@]}"
    stage stop-one-video 30 "${stop[@]}" --videos 1 --scope blocks --direction inference
    stage fused 25 python3 "$root/bench/fused.py" --json "$out/fused.json" --seconds 0.5 "${commit[@]}"
    stage charts 20 python3 "$root/bench/plot.py" "$out/rows.json" --png "$out/chart.png" --table "$out/table.md"
    stage stop-charts 20 python3 "$root/bench/plot_stop.py" "$out/stop.json" --png "$out/stop.png" --table "$out/stop.md"
}
models() {
    commit=(${BENCH_COMMIT:+--commit "$BENCH_COMMIT"})
    stage models 330 python3 "$root/bench/models.py" --json "$out/models.json" --seconds 6 "${commit[@]}" \
        --direction inference training
    stage models-charts 20 python3 "$root/bench/plot_models.py" "$out/models.json" --png "$out/models.png" --table "$out/models.md"
}
[[ $what =~ ^(tests|models)$ ]] || benchmarks
[ "$what" != models ] || models

{
    printf '\n===== summary\n'
    printf '%s\n' "${summary[@]}"
    [ "$failed" = 0 ] && echo "all stages passed" || echo "some stages failed"
} | tee -a "$report"
exit "$failed"
