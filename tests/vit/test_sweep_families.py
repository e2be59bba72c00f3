# SPDX-License-Identifier: Apache-2.0
"""Sweeps of a model of each class of blocks."""

import pytest
import stoptome_kernels as stk
import torch

from support.families import families
from support.sweep import looks, same_looks


@pytest.mark.parametrize("family", list(families()), ids=lambda family: family.name)
def test_every_family(family):
    """The model is as before, with the same answer to the bit, and the row is that of the patched model's answer."""
    model = family.make()
    with torch.no_grad():
        want, before = family.run(model), looks(model)
        (plain, row) = stk.sweep(model, call=family.run, r=2, seconds=0).rows
        assert same_looks(before, looks(model))
        assert torch.equal(family.run(model), want)
        stk.apply_tome_patch(model, 2)
        got = family.run(model)
    cosine = torch.cosine_similarity(got.flatten(1).double(), want.flatten(1).double()).mean().item()
    assert row.cosine == pytest.approx(cosine, abs=1e-6)
    assert row.cosine < plain.cosine == pytest.approx(1, abs=1e-9)
