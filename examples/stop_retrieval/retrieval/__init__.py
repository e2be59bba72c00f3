# SPDX-License-Identifier: Apache-2.0
"""Text-video retrieval with STOP and token merging: what ``main.py`` and ``accuracy.py`` are made of."""
