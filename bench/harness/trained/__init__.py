# SPDX-License-Identifier: Apache-2.0
"""A vision transformer with trained weights, and real pictures and films to show it."""
