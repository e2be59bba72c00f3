#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU, in one command: see gpu_suite.py.
#
#   bench/gpu_suite.sh OUTDIR [first|second|tests|bench|models|all|dry] [--cache FILE.tar.gz]
exec python3 "$(dirname "$0")/gpu_suite.py" "$@"
