# SPDX-License-Identifier: Apache-2.0
"""The instruction sets of the native kernels that a machine may have."""

import platform

ISAS = ["baseline", "avx2", "avx512"] if platform.machine() == "x86_64" else ["baseline"]
