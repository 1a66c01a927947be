"""What calls hold of memory, counted on tensors that may have none (device "meta")."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """The most bytes that live at once beside the tensors given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live, self.most = {tensor.untyped_storage()._cdata: 0 for tensor in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.most = max(self.most, sum(self.live.values()))
        return results
