"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def guarded_workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN between guards: what is read before it was written is seen, and what is written beside."""
    empty, made = torch.empty, []

    def guarded(*args, **settings):
        like = empty(*args, **settings)
        made.append(like.new_full((like.numel() + 128,), float("nan") if like.is_floating_point() else -77))
        return made[-1][64:-64].view(like.shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    for flat in made:
        for guard in (flat[:64], flat[-64:]):
            assert (guard.isnan() if flat.is_floating_point() else guard == -77).all()
