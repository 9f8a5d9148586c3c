"""Which sites a pass looks at when it proves that a value stays the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from rewriter.passes._infra import Lowering, PassError
from rewriter.sites import Site

SAMPLES = 8


def few_of_each(sites: Iterable[Site]) -> Iterator[Site]:
    """Return the first few sites of every chain over tensors of every form, where steps are hoisted or fused.

    What is proven is about code, the same for all of them: whether a step's declarations are true. The numbers of
    one site more, which training is about to change, would prove nothing more, and evaluating thousands takes longer
    than everything else that a pass does.
    """
    seen: Counter[object] = Counter()
    for site in (site for site in sites if site.hoisted or site.fused):
        forms = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in site.originals)
        form = (site.spec.identity, site.fused, site.hoisted, forms)
        seen[form] += 1
        if seen[form] <= SAMPLES:
            yield site


def same_values(why_not: Callable[[Site, Sequence[Tensor]], str]) -> Callable[[Lowering], None]:
    """Return what a pass ensures that leaves all values as they are.

    Arguments:
        why_not: a site and the tensors that it reads → in which way its value is another; nothing where it is not.
    """

    def ensure(lowering: Lowering) -> None:
        for site in few_of_each(lowering.order):
            problem = why_not(site, site.read_inputs())
            if problem:
                raise PassError(f"{site.spec.name}: {problem}")

    return ensure
