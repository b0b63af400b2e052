"""A head: what turns hidden states into logits, the target's own or the one that an adapter drafts from.

That may be the target's, some rows of it (FR-Spec, arXiv 2502.14856), or two factors of a low rank (SlimSpec, arXiv
2605.10453).
"""

from typing import NamedTuple

from torch import Tensor

from kangaroo_kernels.contract import DraftVocabulary, TrainedConfidence
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head, trained_confidence

from .backend import REFERENCES, Backend


class Head(NamedTuple):
    """A norm and a matrix, perhaps behind another matrix that leaves them fewer columns.

    Attributes:
        norm: ``[hidden]``, or ``[r]`` behind a matrix of r rows.
        weight: ``[V, hidden]`` or ``[V, r]``, and R rows instead of V with a vocabulary of R tokens.
        eps: of the norm.
        vocabulary: the tokens of the weight's rows, on its device; None where it has all.
        down: ``[r, hidden]``; None where the norm reads the hidden states themselves.
        trained: what its confidence is made of, where that was trained; None for the softmax's.
    """

    norm: Tensor
    weight: Weight
    eps: float
    vocabulary: DraftVocabulary | None = None
    down: Weight | None = None
    trained: TrainedConfidence | None = None

    def narrow(self, hidden: Tensor, backend: Backend, active: Tensor | None = None) -> Tensor:
        """What norm and weight read of hidden states ``[M, hidden]``: these, or ``[M, r]``."""
        if self.down is None:
            return hidden
        narrowed: Tensor = backend.for_rows(len(hidden)).linear_residual(hidden, self.down, None, active=active)
        return narrowed

    def logits(self, hidden: Tensor) -> Tensor:
        """By the reference: ``[M, hidden]`` to ``[M, V]`` float32, -inf for a token without a row."""
        return self.whole_rows(lm_head(self.narrow(hidden, REFERENCES), self.norm, self.weight, eps=self.eps))

    def confidence(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """How sure the head is of the drafts behind ``hidden`` ``[M, hidden]``, whose rows gave ``logits``: ``[M]``."""
        return trained_confidence(self.narrow(hidden, REFERENCES), confidence_of(logits), self.trained, self.eps)

    def whole_rows(self, logits: Tensor) -> Tensor:
        """Logits of the weight's rows, ``[M, R]``, as those of all tokens: ``[M, V]``, -inf for one without a row."""
        return logits if self.vocabulary is None else self.vocabulary.spread(logits)
