"""What figures with random weights rest on: models near real ones' numbers."""

import torch
from random_model import random_target

from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.workloads import TINY


def test_states_stay_near_one_through_many_layers():
    shape = TINY._replace(layers=32)
    target = random_target(shape, torch.device("cpu"), torch.bfloat16, backend=REFERENCES)
    cache = target.new_cache()
    cache.reserve(64)
    with torch.inference_mode():
        hidden = target.run(target.embed(list(range(64))), cache, 0, 0, shape.layers)
        logits = target.logits(hidden)
    assert hidden.dtype == torch.bfloat16
    assert 0.5 < float(hidden.float().std()) < 4
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3
