"""What a process tells `linear_cross_entropy` of the classes that it holds where others hold the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, distributed


@dataclass(frozen=True)
class VocabularyShard:
    """The classes of a head that this process holds: of `classes` in all, those from `first` on, as many as the weight
    that it gives has rows, which may be none.

        first, end = classes * rank // ranks, classes * (rank + 1) // ranks
        shard = VocabularyShard.of_group(first, classes, group)
        loss = linear_cross_entropy(hidden, head[first:end], target, shard=shard)

    reduce: puts together what the shards know: reduce(tensor, "max") and reduce(tensor, "sum") change a contiguous
        tensor, in place, to the largest or the sum over all shards, each class being in one of them. Every process
        makes the same calls in the same order. None: there is no other shard.
    sum_input_gradient: whether the gradient of `input` is summed over the shards, in float32, so that every process has
        the whole of it. Otherwise each has its own classes' part, for a sum that the caller has anyway (of a sequence's
        pieces, say).
    """

    first: int
    classes: int
    reduce: Callable[[Tensor, str], None] | None = None
    sum_input_gradient: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "classes"):
            given = getattr(self, name)
            if type(given) is not int or given < 0:
                raise ValueError(f"VocabularyShard: {name} is {given!r}; expected a whole number, 0 or more")

    @classmethod
    def of_group(cls, first: int, classes: int, group=None, *, sum_input_gradient: bool = True) -> VocabularyShard:
        """Of the processes of a group of torch.distributed (None: of all), by its all_reduce."""
        operations = {"max": distributed.ReduceOp.MAX, "sum": distributed.ReduceOp.SUM}

        def reduce(tensor: Tensor, what: str) -> None:
            distributed.all_reduce(tensor, operations[what], group=group)

        return cls(first, classes, reduce, sum_input_gradient)
