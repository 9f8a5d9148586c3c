"""Which sites a pass looks at when it proves that a value stays the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rewriter.runtime import ParametrizedTensor

SAMPLES = 8


def few_of_each(sites: Iterable[ParametrizedTensor]) -> Iterator[ParametrizedTensor]:
    """Return the first few sites of every chain over tensors of every form.

    What is proven is about code, the same for all of them: whether a step's declarations are true. The numbers of
    one site more, which training is about to change, would prove nothing more, and evaluating thousands takes longer
    than everything else that a pass does.
    """
    seen: Counter[object] = Counter()
    for site in sites:
        forms = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in site.originals)
        form = (site.record.identity, site.fused, site.hoisted, forms)
        seen[form] += 1
        if seen[form] <= SAMPLES:
            yield site
