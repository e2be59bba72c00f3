# SPDX-License-Identifier: Apache-2.0
"""Normalisation of images."""

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, deviation
