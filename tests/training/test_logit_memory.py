"""The memory estimate counts the fp32 tensors that the losses on logits really hold at the same time."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_jet.configs.training import LOGIT_CHUNK_TENSORS, LOGIT_CHUNK_TOKENS
from megatron_jet.training.vocab_parallel import LogitLoss, logit_losses

TOKENS, VOCAB, CHUNK = 24, 96, 8


class Peak(TorchDispatchMode):
    """Most fp32 tensors of one chunk's size that exist at the same time."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                storage = tensor.untyped_storage()
                if storage.nbytes() == CHUNK * VOCAB * 4:
                    self.alive[storage._cdata] = StorageWeakRef(storage)
        self.most = max(self.most, sum(not reference.expired() for reference in self.alive.values()))
        return out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("cross_entropy", [0.0, 1.0])
def test_estimate_counts_what_the_losses_hold(reverse, temperature, cross_entropy):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, VOCAB, generator=generator).bfloat16() for _ in range(2))
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    what = LogitLoss(kl=1.0, reverse=reverse, temperature=temperature, cross_entropy=cross_entropy, chunk_tokens=CHUNK)
    student.requires_grad_()
    with Peak() as peak:
        logit_losses(student * 1, teacher, labels, torch.full((TOKENS,), 1 / TOKENS), what)
    assert peak.most == LOGIT_CHUNK_TENSORS - (cross_entropy == 0)


def test_both_use_the_same_chunk():
    assert LogitLoss().chunk_tokens == LOGIT_CHUNK_TOKENS
