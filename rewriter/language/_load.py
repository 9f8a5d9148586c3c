"""Reading a spec: a text becomes a document, and a document an immutable Spec or one error with every problem."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from rewriter.language._arguments import Resolver, import_modules
from rewriter.language._explain import explain
from rewriter.language._problems import raise_all
from rewriter.language._read import read
from rewriter.language._references import check_references
from rewriter.language._spec import Spec


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
        source: a path, YAML text, or a mapping whose chains may contain modules. Text without a line break is a
            path if such a file exists or it ends in ``.yaml``, ``.yml`` or ``.json``. A Spec is returned as it is.
        allow_imports: packages whose code the spec's ``imports`` may run; ``None`` for any.

    Raises:
        SpecError: with every problem of the spec, each at its line and column.
    """
    if isinstance(source, Spec):
        return source
    document = read(source)
    modules, problems = import_modules(document.data, allow_imports)
    resolver = Resolver(modules, missing=frozenset(str(problem.path[-1]) for problem in problems))
    problems += check_references(document.data)
    spec = None
    try:
        spec = Spec.model_validate(document.data, context=resolver)
    except ValidationError as wrong:
        problems += explain(wrong)
    if spec is None or problems or document.problems:
        raise_all(document, problems)
    assert spec is not None
    spec._place(document if document.mark else replace(document, data=None))
    return spec
