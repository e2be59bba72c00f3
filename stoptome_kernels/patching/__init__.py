# SPDX-License-Identifier: Apache-2.0
"""The parts that any patch of a model needs: other classes for its modules, reasons to refuse one, a trial before."""
