# SPDX-License-Identifier: Apache-2.0
"""Parts that the commands of bench/ share: inputs, baselines, checks, clocks, rows, and the main of them all."""
