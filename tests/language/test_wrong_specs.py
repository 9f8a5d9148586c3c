"""Each wrong spec has one caret, ``‸``, where its problem has to be reported."""

from __future__ import annotations

import pytest

from rewriter.errors import SpecError
from rewriter.language import load_spec

HEAD = "reparam: 1\nimports: {my: my_pkg.constraints}\n"
RULE = "rules:\n  - name: a\n    select: 'fc.weight'\n    chain: [orthogonal]\n"

TOP = {
    "a scalar": ("‸5\n", "a spec must be a mapping, found 5"),
    "a list": ("‸- reparam: 1\n", "must be a mapping, found a list"),
    "a word": ("‸spec.txt\n", "if it is a path, there is no such file"),
    "no version": (f"‸{RULE}", "write `reparam: 1` as the first line"),
    "no rules": ("‸reparam: 1\n", "missing key 'rules'"),
    "another version": (f"reparam: ‸2\n{RULE}", "version 1 is read"),
    "a version in words": (f"reparam: ‸one\n{RULE}", "must be a whole number, found 'one'"),
    "a version as a float": (f"reparam: ‸1.0\n{RULE}", "must be a whole number, found 1.0"),
    "a version as a boolean": (f"reparam: ‸true\n{RULE}", "must be a whole number, found true"),
    "unknown key": (f"reparam: 1\n‸rule: []\n{RULE}", "did you mean 'rules'?"),
    "unknown key unlike any": (f"reparam: 1\n‸zzz: 1\n{RULE}", "known keys: reparam, imports, absorb, rules"),
    "unknown key in brackets": (f"reparam: 1\n‸<text>: 1\n{RULE}", "unknown key '<text>'"),
    "directive of 1.1": (f"‸%YAML 1.1\n---\nreparam: 1\n{RULE}", "YAML 1.2"),
    "absorb in words": (f"reparam: 1\nabsorb: ‸yes\n{RULE}", "write true or false"),
    "rules as a mapping": ("reparam: 1\nrules: ‸{name: a}\n", "`rules` must be a list, found a mapping"),
    "rules empty of value": ("reparam: 1\nrules:‸\n", "`rules` must be a list, found nothing"),
    "a rule as text": ("reparam: 1\nrules:\n  - ‸orthogonal\n", "a rule must be a mapping, found 'orthogonal'"),
    "imports as a list": (f"reparam: 1\nimports: ‸[my]\n{RULE}", "`imports` must be a mapping, found a list"),
    "import of a number": (f"reparam: 1\nimports: {{my: ‸3}}\n{RULE}", "must be text, found 3"),
    "import of a path": (f"reparam: 1\nimports: {{my: ‸a/b.py}}\n{RULE}", "is not a dotted name"),
    "import prefix": (f"reparam: 1\nimports: {{‸my-own: my_pkg}}\n{RULE}", "is not a name of letters"),
    "import over torch": (f"reparam: 1\nimports: {{‸torch: my_pkg}}\n{RULE}", "the prefix 'torch' means torch"),
    "import that is missing": (f"reparam: 1\nimports: {{my: ‸no_such.mod}}\n{RULE}", "there is no module 'no_such'"),
    "import inside that is missing": (f"reparam: 1\nimports: {{my: ‸my_pkg.no}}\n{RULE}", "no module 'my_pkg.no'"),
    "import that raises": (f"reparam: 1\nimports: {{my: ‸my_pkg.broken}}\n{RULE}", "ValueError: not today"),
    "import that exits": (f"reparam: 1\nimports: {{my: ‸my_pkg.leaves}}\n{RULE}", "SystemExit: 3"),
    "import that needs more": (f"reparam: 1\nimports: {{my: ‸my_pkg.needy}}\n{RULE}", "a_package_that_is_not_there"),
}  # fmt: skip

KEYS = {
    "missing name": ("  - ‸select: x\n    chain: [orthogonal]\n", "missing key 'name'"),
    "missing select": ("  - ‸name: b\n    chain: [orthogonal]\n", "missing key 'select'"),
    "missing chain": ("  - ‸name: b\n    select: x\n", "missing key 'chain'"),
    "empty name": ("  - name: ‸''\n    select: x\n    chain: [orthogonal]\n", "`name` is empty"),
    "name with spaces around": ("  - name: ‸' b'\n    select: x\n    chain: [orthogonal]\n", "without spaces around"),
    "name as a number": ("  - name: ‸3\n    select: x\n    chain: [orthogonal]\n", "quote it"),
    "name twice": ("  - name: ‸a\n    select: x\n    chain: [orthogonal]\n", "rules[0] has the name 'a' already"),
    "overriding each other": (
        "  - {name: b, select: x, chain: [orthogonal], overrides: [c]}\n"
        "  - {name: c, select: x, chain: [orthogonal], overrides: [‸b]}\n",
        "the rules 'c' and 'b' override each other",
    ),
    "empty chain": ("  - name: b\n    select: x\n    chain: ‸[]\n", "an empty chain does nothing"),
    "chain as text": ("  - name: b\n    select: x\n    chain: ‸orthogonal\n", "write [orthogonal]"),
}

RULE_KEYS = {
    "unknown": ("‸cash: never", "did you mean 'cache'?"),
    "python spelling of except": ("‸exclude: x", "unknown key 'exclude'"),
    "cache": ("cache: ‸forwards", "did you mean 'forward'?"),
    "cache as a boolean": ("cache: ‸false", "must be 'forward', 'never' or 'version', found false"),
    "init": ("init: ‸kept", "did you mean 'keep'?"),
    "batch": ("batch: ‸Never", "did you mean 'never'?"),
    "memory": ("memory: ‸recompile", "did you mean 'recompute'?"),
    "share": ("share: ‸on", "on, off, yes and no are text"),
    "unsafe": ("unsafe: ‸1", "must be true or false, found 1"),
    "expect word": ("expect: ‸all", "a count is written 33, '1..', '3..8' or '..5'"),
    "expect text": ("expect: ‸'7'", "a count is written"),
    "expect dots": ("expect: ‸'..'", "a count is written"),
    "expect backwards": ("expect: ‸8..3", "the least count is above the largest"),
    "expect negative": ("expect: ‸-1", "cannot be negative"),
    "expect float": ("expect: ‸1.5", "must be a whole number or text, found 1.5"),
    "expect true": ("expect: ‸true", "must be a whole number or text, found true"),
    "overrides text": ("overrides: ‸a", "write [a]"),
    "overrides nobody": ("overrides: [a, ‸aa]", "there is no rule named 'aa'"),
    "overrides itself": ("overrides: [‸b]", "cannot override itself"),
    "overrides twice": ("overrides: ‸[a, a]", "'a' is written twice"),
    "overrides empty": ("overrides: ‸[]", "`overrides` is empty"),
    "per of several": (
        "joint: [weight, bias]\n    ‸per: {dim: 0, chunks: 4}",
        "`joint` makes the chain compute several",
    ),
    "from of several": ("joint: [weight, bias]\n    ‸from: x.weight", "`from` is about one tensor"),
    "per number": ("per: ‸4", "`per` must be a mapping, found 4"),
    "per without chunks": ("per: ‸{dim: 0}", "missing key 'chunks'"),
    "per zero chunks": ("per: {dim: 0, chunks: ‸0}", "must be greater than or equal to 1, found 0"),
    "per unknown": ("per: {dim: 0, chunks: 4, ‸chunk: 4}", "did you mean 'chunks'?"),
    "reshape text": ("reshape: ‸out", "`reshape` must be a list"),
    "reshape word": ("reshape: [‸outt, -1]", "did you mean 'out'?"),
    "reshape zero": ("reshape: ‸[out, 0]", "'out', 'in', -1 or positive"),
    "reshape two free": ("reshape: ‸[-1, -1]", "only one size"),
    "reshape float": ("reshape: [‸2.0]", "an entry of `reshape` must be a whole number or text"),
    "from list": ("from: ‸[embed.weight]", "`from` must be text, found a list"),
    "from null": ("from:‸", "`from` must be text, found nothing"),
    "joint of one": ("joint: ‸[weight]", "must have at least 2 entries, found 1"),
    "joint twice": ("joint: ‸[weight, weight]", "'weight' is written twice"),
    "except empty": ("except: ‸[]", "`except` is empty"),
    "except number": ("except: [‸3]", "must be text or a mapping, found 3"),
    "except null": ("except:‸", "must be text or a mapping or a list, found nothing"),
    "repeated": ("‸name: b", "repeated key 'name'; line 7, column 5 has it already"),
    "leading zero": ("expect: ‸010", "010 is octal to some readers; write 10 or quote it"),
    "infinity": ("expect: ‸.inf", "must be a whole number or text, found inf"),
    "more than 64 bits": ("expect: ‸99999999999999999999", "needs more than 64 bits"),
    "tag": ("cache: ‸!!python/name:os.system x", "tags are not read"),
    "local tag": ("cache: ‸!mine never", "tags are not read, found '!mine'"),
    "key that is a number": ("‸1: x", "a key must be text, found 1 (quote it)"),
    "key that is true": ("‸true: x", "a key must be text, found true (quote it)"),
    "key that is a list": ("‸[a]: x", "a key must be text, found a list"),
    "key that is nothing": ("‸'': x", "unknown key ''"),
}

SELECTORS = {
    "number": ("‸3", "`select` must be text or a mapping or a list, found 3"),
    "nothing": ("‸{}", "would match everything"),
    "empty": ("‸''", "an empty pattern"),
    "open brace": ("‸'a.{b'", "'{' at character 3 is never closed"),
    "closing brace": ("‸'a.b}'", "'}' without '{' at character 4"),
    "two dots": ("‸a..b", "an empty segment"),
    "dot at the end": ("‸a.", "an empty segment"),
    "entry": ("[a, ‸[b]]", "must be text or a mapping, found a list"),
    "second pattern": ("[a, ‸'{b']", "never closed"),
    "unknown predicate": ("{‸modul: Linear}", "did you mean 'module'?"),
    "path": ("{path: ‸'{'}", "never closed"),
    "regex": ("{regex: ‸'('}", "not a regular expression"),
    "module glob": ("{module: ‸'*Linear'}", "is not a dotted name"),
    "kind": ("{kind: ‸params}", "did you mean 'parameter'?"),
    "kind of both": ("{kind: ‸both}", "must be 'parameter' or 'buffer', found 'both'"),
    "ndim": ("{ndim: ‸two}", "a size is written"),
    "shape text": ("{shape: ‸'64'}", "write [64]"),
    "shape comparison": ("{shape: [‸'=>64', '*']}", "a size is written 3, '*', '>=64'"),
    "shape negative": ("{shape: [‸-3]}", "a size cannot be negative"),
    "dtype": ("{dtype: ‸flot32}", "did you mean 'float32'"),
    "requires_grad": ("{requires_grad: ‸'true'}", "must be true or false, found 'true'"),
    "predicate in a list": ("[{module: Linear, ‸shap: [1]}]", "did you mean 'shape'?"),
}

STEPS = {
    "unknown": ("‸ortogonal", "did you mean 'orthogonal'"),
    "unknown with arguments": ("‸ortogonal: {map: cayley}", "unknown parametrization 'ortogonal'"),
    "torch's own name": (
        "‸torch.nn.utils.parametrizations.orthogonal",
        "did you mean `orthogonal`, or `torch.Orthogonal`?",
    ),
    "infinity for a count": ("spectral_norm: {n_power_iterations: ‸.inf}", "must be a whole number, found inf"),
    "not a number": ("spectral_norm: {eps: ‸.nan}", ".nan is not a number"),
    "beyond the largest float": ("spectral_norm: {eps: ‸1e999}", "write .inf"),
    "number": ("‸3", "a step of `chain` must be text or a mapping, found 3"),
    "null": ("‸~", "a step of `chain` must be text or a mapping, found nothing"),
    "nothing": ("‸{}", "a step names one parametrization, found 0"),
    "two": ("‸{orthogonal: {}, symmetric: {}}", "start each step with `- `"),
    "not indented": ("‸orthogonal:\n        map: cayley", "indent the arguments of `orthogonal` further"),
    "arguments as text": ("orthogonal: ‸cayley", "the arguments of `orthogonal` must be a mapping, found 'cayley'"),
    "argument": ("orthogonal: {‸mep: cayley}", "'orthogonal' has no argument 'mep'"),
    "argument hint": ("orthogonal: {‸trivialisation: true}", "did you mean 'trivialization'?"),
    "choice": ("orthogonal: {map: ‸caley}", "did you mean 'cayley'?"),
    "boolean": ("orthogonal: {trivialization: ‸no}", "must be true or false, found 'no'"),
    "float for int": ("spectral_norm: {n_power_iterations: ‸1.5}", "must be a whole number, found 1.5"),
    "text for float": ("spectral_norm: {eps: ‸'1e-3'}", "must be a number, found '1e-3'"),
    "boolean for int": ("spectral_norm: {n_power_iterations: ‸true}", "must be a whole number, found true"),
    "none taken": ("my.Fold: {‸factor: 2}", "it takes no arguments"),
    "missing argument": ("‸my.Scale", "'my.Scale' needs the argument 'factor'"),
    "user's choice": ("my.Scale: {factor: 2, mode: ‸mull}", "did you mean 'mul'?"),
    "user's list": ("my.Window: {sizes: ‸3}", "must be a list of whole numbers, found 3"),
    "a number of either kind": ("my.Bound: {by: ‸x}", "`by` must be a number or null, found 'x'"),
    "a tensor in text": ("mask: {mask: ‸[[1, 0]]}", "`mask` must be a Tensor or null, found a list"),
    "an entry of the user's list": (
        "my.Window: {sizes: [3, ‸x]}",
        "must be a list of whole numbers, found 'x' in it",
    ),
    "user's optional": ("my.Window: {sizes: [3], names: ‸a}", "must be a list of text or null, found 'a'"),
    "user's class": ("‸my.Scales: {factor: 2}", "did you mean 'my.Scale'?"),
    "prefix": ("‸mine.Scale: {factor: 2}", "unknown prefix 'mine'"),
    "no module": ("‸my.NoModule", "is a class, but no torch.nn.Module"),
    "an instance": ("‸my.one", "is an instance of Scale; name the class"),
    "an attribute that fails": ("‸my.Lazy", "ImportError: the compiled part is missing"),
    "function from elsewhere": ("‸my.os.system: {command: ls}", "is no parametrization"),
    "injected": ("my.half: {‸size: 3}", "'my.half' has no argument 'size'"),
    "label": ("orthogonal: {label: ‸3}", "`label` must be text, found 3"),
    "label with a dot": ("orthogonal: {label: ‸a.b}", "is not a label"),
    "label twice": ("orthogonal: {label: q}\n      - symmetric: {label: ‸q}", "chain[0] has the label 'q' already"),
    "inputs text": ("orthogonal: {inputs: ‸a.weight}", "write [a.weight]"),
    "inputs empty": ("orthogonal: {inputs: ‸[]}", "`inputs` is empty"),
}

SYNTAX = {
    "unclosed quote": ("rules: ‸'a\n", "not YAML: this quote is not closed"),
    "tab": ("rules:\n‸\t- name: a\n", "not YAML: a tab; YAML is indented with spaces"),
    "colon in a value": ("rules: a‸: b\n", "not YAML: mapping values are not allowed"),
    "unquoted star": ("rules:\n  - select: *‸*.weight\n", "quote a pattern that starts with *"),
    "unquoted star before a word": ("rules:\n  - select: ‸*weight\n", "quote a pattern that starts with *"),
    "unquoted star in a shape": ("rules:\n  - select: {shape: [3, *‸]}\n", "quote a pattern that starts with *"),
    "unquoted brace": ("rules:\n  - select: {q,k}‸.weight\n", "quote a pattern that starts with * or {"),
    "unknown alias": ("rules: ‸*nowhere\n", "has no anchor"),
    "alias in itself": ("rules: &a [‸*a]\n", "is inside its own anchor"),
    "second document": ("rules: []\n‸---\nrules: []\n", "a second document"),
    "control character": ("rules: a‸\x07\n", "the character U+0007"),
    "NUL": ("rules: ‸\0\n", "the character U+0000"),
    "merge of a number": ("rules: {<<: ‸3}\n", "merges mappings"),
}


PLACES = [
    ("top", TOP, "%"),
    ("rule", KEYS, f"{HEAD}{RULE}%"),
    ("key", RULE_KEYS, f"{HEAD}{RULE}  - name: b\n    select: x\n    chain: [orthogonal]\n    %\n"),
    ("select", SELECTORS, f"{HEAD}rules:\n  - name: b\n    chain: [orthogonal]\n    select: %\n"),
    ("step", STEPS, f"{HEAD}rules:\n  - name: b\n    select: x\n    chain:\n      - %\n"),
    ("syntax", SYNTAX, "reparam: 1\n%"),
]
CASES = [
    pytest.param(around.replace("%", text), message, id=f"{group}: {name}")
    for group, table, around in PLACES
    for name, (text, message) in table.items()
]


@pytest.mark.parametrize(("marked", "message"), CASES)
def test_a_wrong_spec_is_refused_at_its_line_and_column(marked: str, message: str) -> None:
    before, caret, after = marked.partition("‸")
    assert caret, "the case does not say where its problem is"
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    with pytest.raises(SpecError) as caught:
        load_spec(before + after if "\n" in before + after else before + after + "\n")
    here = [found for found in caught.value.diagnostics if message in str(found)]
    assert here, str(caught.value)
    assert (here[0].line, here[0].column) == (line, column), str(caught.value)
    assert f"<spec>:{line}:{column}: " in str(caught.value)


def test_all_problems_come_together_in_the_order_of_the_text() -> None:
    text = f"""\
{HEAD}rules:
  - name: a
    select: "a.{{b"
    cache: sometimes
    name: c
    chain:
      - ortogonal
      - my.Scale: {{factor: fast}}
  - name: a
    selekt: x
    chain: []
"""
    with pytest.raises(SpecError) as caught:
        load_spec(text)
    assert [found.line for found in caught.value.diagnostics] == [5, 6, 7, 9, 10, 11, 11, 12, 13]


def test_a_caret_stands_below_the_column() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(f"reparam: 1\nabsorb: maybe\n{RULE}")
    message, source, caret = str(caught.value).splitlines()[:3]
    assert message == "<spec>:2:9: `absorb` must be true or false, found 'maybe'"
    assert caret.index("^") == source.index("maybe")


def test_of_thousands_of_problems_a_hundred_are_shown() -> None:
    rules = "".join(f"  - {{name: r{i}, select: x, chain: [ortogonal], overrides: [q{i}]}}\n" for i in range(1000))
    with pytest.raises(SpecError) as caught:
        load_spec(f"reparam: 1\nrules:\n{rules}")
    assert len(caught.value.diagnostics) == 101
    assert "and 1900 more problems" in str(caught.value)


def test_a_line_of_a_megabyte_is_not_printed() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("{reparam: 1, absorb: maybe, zzz: " + "x" * 100_000 + "}\n")
    assert len(str(caught.value)) < 2000
