"""A head: what turns hidden states into logits, the target's own or the rows of it that an adapter drafts from."""

from typing import NamedTuple

from torch import Tensor

from kangaroo_kernels.contract import DraftVocabulary, TrainedConfidence
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head, trained_confidence


class Head(NamedTuple):
    """A norm and a matrix.

    Attributes:
        norm: ``[hidden]``.
        weight: ``[V, hidden]``, or ``[R, hidden]`` with a vocabulary of R tokens.
        eps: of the norm.
        vocabulary: the tokens of the weight's rows, on its device; None where it has all.
        trained: what its confidence is made of, where that was trained; None for the softmax's.
    """

    norm: Tensor
    weight: Weight
    eps: float
    vocabulary: DraftVocabulary | None = None
    trained: TrainedConfidence | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """By the reference: ``[M, hidden]`` to ``[M, V]`` float32, -inf for a token without a row."""
        return self.whole_rows(lm_head(hidden, self.norm, self.weight, eps=self.eps))

    def confidence(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """How sure the head is of the drafts behind ``hidden`` ``[M, hidden]``, whose rows gave ``logits``: ``[M]``."""
        return trained_confidence(hidden, confidence_of(logits), self.trained, self.eps)

    def whole_rows(self, logits: Tensor) -> Tensor:
        """Logits of the weight's rows, ``[M, R]``, as those of all tokens: ``[M, V]``, -inf for one without a row."""
        return logits if self.vocabulary is None else self.vocabulary.spread(logits)
