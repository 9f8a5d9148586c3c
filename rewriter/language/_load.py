"""Reading a spec: text, a positioned document, checks that see all of it, an immutable Spec."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from rewriter.language._chains import written_rules, written_steps
from rewriter.language._grammar import check
from rewriter.language._imports import import_modules
from rewriter.language._model import Spec
from rewriter.language._problems import raise_all
from rewriter.language._references import check_references
from rewriter.language._schema import SpecForm
from rewriter.language._source import read


def load_spec(
    source: Spec | str | os.PathLike[str] | Mapping[str, Any], *, allow_imports: Collection[str] | None = None
) -> Spec:
    """Read a spec and check everything that can be checked without a model.

    >>> spec = load_spec('''
    ... reparam: 1
    ... rules:
    ...   - name: kernels
    ...     select: "rnn.**.weight_hh*"
    ...     chain: [{orthogonal: {map: cayley}}]
    ... ''')
    >>> str(spec.rules[0].chain[0])
    'orthogonal(map=cayley)'

    Arguments:
        source: a path, YAML text, or a mapping whose chains may hold modules. Text without a line break is a
            path if such a file exists or it ends in ``.yaml``, ``.yml`` or ``.json``. A Spec comes back.
        allow_imports: packages whose code the spec's ``imports`` may run; ``None`` for any.

    Raises:
        SpecError: with every problem of the spec, each at its line and column.
    """
    if isinstance(source, Spec):
        return source
    document = read(source)
    data = document.data
    form, problems = check(SpecForm, data)
    problems += check_references(data)
    modules, failed = import_modules(data, allow_imports)
    problems += failed

    # What resolves names imports torch, which a spec that is never read should not cost.
    from rewriter.language._arguments import Resolver
    from rewriter.language._build import build

    resolver = Resolver(modules, frozenset(str(problem.path[-1]) for problem in failed))
    steps = {}
    for index, rule in written_rules(data):
        for step in written_steps(rule, index):
            resolved, wrong = resolver.resolve(step)
            problems += wrong
            if resolved is not None:
                steps[index, step.index] = resolved
    raise_all(document, problems)
    assert form is not None
    return build(form, document, steps)
