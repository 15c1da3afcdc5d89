"""Registry files: every kind of mistake is named with file:line and the fix, and the shipped file has none."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml

from torch_triton_ops import RegistryError, distributed, load_registry, registry, specs
from torch_triton_ops.registry import read_registry

NAMESPACE = "tt_test_registry"
OP = f"{NAMESPACE}::scale"

# A correct entry, one key a line, so that a key's line is its place here.
ENTRY = {
    "op": f"{OP}(Tensor x, Tensor? weight=None, float eps=1e-6) -> Tensor",
    "summary": "Scale each row.",
    "module": "scale",
    "forward": f"{OP}_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)",
    "backward": f"{OP}_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
    "visibility": "triton",
    "differentiable": "[x, weight]",
    "dtypes": "[float32, bfloat16]",
    "autocast": "float32",
    "sharding": "rowwise",
    "lesson": "8",
    "source": "https://arxiv.org/abs/1910.07467",
}


def entry(**changes: str | None) -> str:
    """ENTRY as YAML with some keys changed, added, or left out (None)."""
    lines = [f"{key}: {value}" for key, value in {**ENTRY, **changes}.items() if value is not None]
    return "- " + "\n  ".join(lines) + "\n"


def line_of(text: str, key: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if line[2:].startswith(f"{key}:"))


def read_bad(tmp_path: Path, text: str, namespace: str | None = None) -> tuple[Path, str]:
    """Write `text`, read it, return the file and the error's message."""
    file = tmp_path / "my_ops.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RegistryError) as caught:
        read_registry(file, namespace)
    return file, str(caught.value)


def test_the_correct_entry_is_read(tmp_path: Path) -> None:
    file = tmp_path / "my_ops.yaml"
    file.write_text(entry())
    (spec,) = read_registry(file)
    assert (spec.name, spec.namespace, spec.qualname) == ("scale", NAMESPACE, OP)
    assert spec.schema == "scale(Tensor x, Tensor? weight=None, float eps=1e-6) -> Tensor"
    assert [(a.name, a.is_tensor, a.default) for a in spec.arguments] == [
        ("x", True, None),
        ("weight", True, None),
        ("eps", False, 1e-6),
    ]
    assert [d.kind for d in spec.decls] == ["public", "forward", "backward"]
    assert spec.differentiable == ("x", "weight")
    assert spec.dtypes == (torch.float32, torch.bfloat16)
    assert spec.where == f"{file}:1"


def test_an_empty_file_has_no_entries(tmp_path: Path) -> None:
    file = tmp_path / "my_ops.yaml"
    file.write_text("# nothing yet\n")
    assert read_registry(file) == []


# -- mistakes in the file as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        pytest.param("- op: x\n  summary: [a, b\n", 3, ["not valid YAML"], id="not_yaml"),
        pytest.param("- op: x\n\tsummary: y\n", 2, ["not valid YAML"], id="tab_indentation"),
        pytest.param("- op: !!python/name:os.system\n", 1, ["plain text", "python/name"], id="yaml_tag"),
        pytest.param("op: x\nsummary: y\n", 1, ["must be a list of entries", "- op:"], id="mapping_instead_of_list"),
        pytest.param("# ops\n\njust text\n", 3, ["must be a list of entries", "- op:"], id="text_instead_of_list"),
        pytest.param(entry() + "- scale\n", 13, ["must be a mapping", "- op:"], id="entry_no_mapping"),
        pytest.param(entry() + "- [a, b]\n", 13, ["must be a mapping", "- op:"], id="entry_a_list"),
    ],
)
@pytest.mark.parametrize("loader", ["SafeLoader", "CSafeLoader"])
def test_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, text: str, line: int, says: list[str]
) -> None:
    """With PyYAML's own parser and with libyaml's, whichever it was built with."""
    if not hasattr(yaml, loader):
        pytest.skip("PyYAML is built without libyaml")
    monkeypatch.setattr(registry, "_LOADER", getattr(yaml, loader))
    file, message = read_bad(tmp_path, text)
    assert message.startswith(f"{file}:{line}: ")
    for part in says:
        assert part in message


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "my_ops.yaml"
    file.write_bytes(b"# fine\n- op: \xff\n")
    with pytest.raises(RegistryError, match=re.escape(f"{file}:2: ") + "not UTF-8.*save it as UTF-8"):
        read_registry(file)


@pytest.mark.parametrize("load", [read_registry, load_registry])
def test_no_such_file(tmp_path: Path, load) -> None:
    file = tmp_path / "missing.yaml"
    with pytest.raises(FileNotFoundError, match=re.escape(str(file)) + ".*give the path of a YAML file"):
        load(file)


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + ".*give the path of a YAML file"):
        read_registry(tmp_path)


# -- mistakes in one key --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        pytest.param("visibilty", "opaque", ["unknown key 'visibilty'", "did you mean 'visibility'?"], id="typo"),
        pytest.param("zzz", "1", ["unknown key 'zzz'", "allowed: op, summary, module"], id="unknown_key"),
        pytest.param("op", "[a]", ["op must be a schema like", "['a']"], id="schema_no_text"),
        pytest.param("op", f"{OP}(Tensor x -> Tensor", ["bad schema", "example: "], id="bad_schema"),
        pytest.param("op", f"{OP}(Tensr x) -> Tensor", ["bad schema", "Tensr", "example: "], id="bad_schema_type"),
        pytest.param("op", "scale(Tensor x) -> Tensor", ["'scale' needs a namespace", "my::scale"], id="no_namespace"),
        pytest.param("op", "tt::scale(Tensor x) -> Tensor", ["'tt' belongs to", "my::scale"], id="namespace_tt"),
        pytest.param("op", f"{OP}.out(Tensor x) -> Tensor", ["overloads are not", "without '.out'"], id="overload"),
        pytest.param("op", f"{OP}(int n) -> Tensor", ["'scale' takes no Tensor", "at least one"], id="no_tensor"),
        pytest.param("summary", "Scale each row", ["summary", "ends with a full stop"], id="summary_no_full_stop"),
        pytest.param("summary", '"Scale.\\nEach row."', ["summary", "on one line"], id="summary_two_lines"),
        pytest.param("summary", '""', ["summary must be a non-empty string"], id="summary_empty"),
        pytest.param("module", "scale.py/x", ["'scale.py/x' is not a Python module name"], id="module_path"),
        pytest.param("module", "my-scale", ["'my-scale' is not a Python module name", ".py"], id="module_hyphen"),
        pytest.param("module", "class", ["'class' is not a Python module name"], id="module_keyword"),
        pytest.param("module", "3", ["module must be a non-empty string, not 3"], id="module_number"),
        pytest.param("forward", "7", ["forward must be a schema like", "7"], id="forward_no_text"),
        pytest.param("forward", f"{OP}_fwd(Tensor x", ["bad schema", "example: "], id="forward_bad_schema"),
        pytest.param(
            "forward", "other::scale_fwd(Tensor x) -> Tensor", ["'other::scale_fwd'", NAMESPACE], id="other_namespace"
        ),
        pytest.param(
            "forward",
            f"{OP}_fwd(Tensor x, *, float eps) -> Tensor",
            ["keyword-only", "remove the '*'"],
            id="kwonly_fwd",
        ),
        pytest.param(
            "backward",
            f'["{OP}_bwd(Tensor dy, *, float eps) -> Tensor"]',
            ["'scale_bwd' has keyword-only", "remove the '*'"],
            id="keyword_only_bwd",
        ),
        pytest.param("visibility", "hidden", ["'hidden'", "allowed: triton, opaque"], id="visibility"),
        pytest.param("visibility", "", ["visibility is None", "allowed: triton, opaque"], id="visibility_empty"),
        pytest.param("differentiable", "x", ["must be a list of names", "'x'"], id="differentiable_no_list"),
        pytest.param("differentiable", "[x, bias]", ["'bias' is no Tensor argument", "x, weight"], id="no_argument"),
        pytest.param("differentiable", "[eps]", ["'eps' is no Tensor argument", "x, weight"], id="not_a_tensor"),
        pytest.param("differentiable", "[weight, x]", ["order: ['x', 'weight']"], id="differentiable_order"),
        pytest.param("differentiable", "[x, x]", ["names something twice"], id="differentiable_twice"),
        pytest.param("dtypes", "[float33]", ["unknown dtype 'float33'", "allowed: float32, "], id="dtype"),
        pytest.param("dtypes", "[]", ["dtypes is empty", "list at least one"], id="dtypes_empty"),
        pytest.param("dtypes", "float32", ["must be a list of names"], id="dtypes_no_list"),
        pytest.param("dtypes", "[float32, float32]", ["names something twice"], id="dtype_twice"),
        pytest.param("autocast", "float16", ["'float16'", "allowed: float32, autocast_dtype"], id="autocast"),
        pytest.param("sharding", "columns", ["'columns'", "allowed: elementwise, transposed"], id="sharding"),
        pytest.param("lesson", "13", ["lesson is 13", "from 1 to 12"], id="lesson_out_of_range"),
        pytest.param("lesson", "eight", ["lesson is 'eight'", "from 1 to 12"], id="lesson_no_number"),
        pytest.param("lesson", "true", ["lesson is True", "from 1 to 12"], id="lesson_boolean"),
        pytest.param("source", "[a]", ["source must be a non-empty string"], id="source_no_text"),
    ],
)
def test_bad_value(tmp_path: Path, key: str, value: str, says: list[str]) -> None:
    text = entry(**{key: value})
    file, message = read_bad(tmp_path, text)
    assert message.startswith(f"{file}:{line_of(text, key)}: "), message
    for part in says:
        assert part in message


@pytest.mark.parametrize("key", ["op", "summary", "module", "visibility", "dtypes"])
def test_missing_key(tmp_path: Path, key: str) -> None:
    file, message = read_bad(tmp_path, entry() + entry(**{key: None}))
    assert message.startswith(f"{file}:13: key '{key}' is missing; every entry needs op, summary, ")


def test_duplicate_key(tmp_path: Path) -> None:
    file, message = read_bad(tmp_path, entry() + "  lesson: 3\n")
    assert message == f"{file}:13: duplicate key 'lesson'; delete one"


@pytest.mark.parametrize("key", ["forward", "backward"])
def test_internal_op_of_an_op_without_gradient(tmp_path: Path, key: str) -> None:
    text = entry(**{"forward": None, "backward": None, key: ENTRY[key], "differentiable": None})
    file, message = read_bad(tmp_path, text)
    assert message.startswith(f"{file}:{line_of(text, key)}: '{key}' without 'differentiable'; list the arguments")


def test_mutating_and_differentiable(tmp_path: Path) -> None:
    text = entry(op=f"{OP}(Tensor(a!) x, Tensor? weight=None, float eps=1e-6) -> ()")
    file, message = read_bad(tmp_path, text)
    assert message.startswith(
        f"{file}:{line_of(text, 'differentiable')}: an op that mutates an argument cannot be diff"
    )
    assert "delete one of the two" in message


def test_line_of_a_later_entry(tmp_path: Path) -> None:
    """The line is that of the mistake, not that of the first entry."""
    file, message = read_bad(tmp_path, "# comment\n\n" + entry() + "\n" + entry(op=f"{OP}2(Tensor x)", lesson="99"))
    assert message.startswith(f"{file}:16: bad schema")


@pytest.mark.parametrize(
    ("second", "name"),
    [
        pytest.param(entry(), OP, id="public"),
        pytest.param(
            entry(op=f"{OP}_bwd(Tensor x, Tensor weight) -> Tensor"), f"{OP}_bwd", id="public_named_as_internal"
        ),
        pytest.param(entry(op=f"{OP}2(Tensor x, Tensor weight) -> Tensor"), f"{OP}_fwd", id="internal"),
    ],
)
def test_duplicate_op(tmp_path: Path, second: str, name: str) -> None:
    file, message = read_bad(tmp_path, entry() + second)
    assert message.startswith(f"{file}:13: duplicate op '{name}', already declared at line 1; give it another name")


def test_duplicate_op_within_an_entry(tmp_path: Path) -> None:
    file, message = read_bad(tmp_path, entry(backward=f"{OP}_fwd(Tensor dy) -> Tensor"))
    assert message.startswith(f"{file}:1: duplicate op '{OP}_fwd', already declared at line 1")


@pytest.mark.parametrize("name", registry.RESERVED)
def test_reserved_name(tmp_path: Path, name: str) -> None:
    text = entry(
        op=f"{name}(Tensor x) -> Tensor", forward=None, backward=None, differentiable=None, sharding=None, lesson=None
    )
    file, message = read_bad(tmp_path, text, namespace="tt")
    assert message.startswith(f"{file}:1: the name '{name}' is used by another vendor's plugin in 'tt'; choose another")


# -- mistakes in the op's module ------------------------------------------------------------------------------------

MODULE = """
def {op}(x, factor=2.0):
    return x * factor

def {op}_fake(x, factor=2.0):
    return x.new_empty(x.shape)

def {op}_reference(x, factor=2.0):
    return x * factor

def {op}_forward(ctx, x, factor):
    ctx.factor = factor
    return x * factor

def {op}_backward(ctx, dout):
    return dout * ctx.factor
"""


def user_file(tmp_path: Path, op: str, source: str | None = MODULE, **changes: str | None) -> Path:
    """A folder with a registry file of one op `tt_test_registry::<op>` and its module, named as no other test's."""
    if source is not None:
        (tmp_path / f"{op}_module.py").write_text(source.format(op=op))
    keys = dict.fromkeys(ENTRY) | {
        "op": f"{NAMESPACE}::{op}(Tensor x, float factor=2.0) -> Tensor",
        "summary": "Scale.",
        "module": f"{op}_module",
        "visibility": "triton",
        "differentiable": "[x]",
        "dtypes": "[float32]",
    }
    file = tmp_path / "my_ops.yaml"
    file.write_text(entry(**(keys | changes)))
    return file


def test_a_correct_user_file_works(tmp_path: Path) -> None:
    (spec,) = load_registry(user_file(tmp_path, "correct"))
    x = torch.randn(3, requires_grad=True)
    out = getattr(torch.ops, NAMESPACE).correct(x, factor=3.0)
    torch.testing.assert_close(out, 3 * x)
    assert registry.spec(f"{NAMESPACE}::correct") is spec
    assert spec not in specs()
    assert spec in specs(None)


def test_module_may_be_a_package_beside_the_file(tmp_path: Path) -> None:
    package = tmp_path / "packed_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .kernels import *\n")
    (package / "kernels.py").write_text(MODULE.format(op="packed"))
    (spec,) = load_registry(user_file(tmp_path, "packed", source=None, module="packed_package"))
    assert [file.name for file in spec.module_files()] == ["__init__.py", "kernels.py"]
    torch.testing.assert_close(spec.op(torch.ones(3)), torch.full((3,), 2.0))


def test_op_registered_by_another_file(tmp_path: Path) -> None:
    load_registry(user_file(tmp_path, "clash"))
    other = tmp_path / "other"
    other.mkdir()
    file = user_file(other, "clash")
    with pytest.raises(RegistryError) as caught:
        load_registry(file)
    assert str(caught.value).startswith(f"{file}:1: the op '{NAMESPACE}::clash' is registered already")
    assert "use another name, or do not load both" in str(caught.value)


def test_op_registered_by_another_package(tmp_path: Path) -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("foreign(Tensor x) -> Tensor")
    file = user_file(tmp_path, "foreign")
    with pytest.raises(
        RegistryError, match=re.escape(f"{file}:1: the op '{NAMESPACE}::foreign' is registered already")
    ):
        load_registry(file)


def test_a_bad_file_registers_nothing(tmp_path: Path) -> None:
    file = user_file(tmp_path, "first")
    file.write_text(file.read_text() + file.read_text().replace("first(", "second(").replace("first_module", "gone"))
    with pytest.raises(RegistryError, match="'gone' not found"):
        load_registry(file)
    assert not torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::first")
    assert f"{NAMESPACE}::first" not in [spec.qualname for spec in specs(None)]


@pytest.mark.parametrize("module", ["not_there", "not_there.inside"])
def test_module_file_missing(tmp_path: Path, module: str) -> None:
    file = user_file(tmp_path, "missing", source=None, module=module)
    with pytest.raises(RegistryError) as caught:
        load_registry(file)
    expected = tmp_path / (module.replace(".", "/") + ".py")
    assert str(caught.value) == f"{file}:1: module '{module}' not found; expected the file {expected}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param(
            "def {op}_fake(",
            "def other(",
            ["must define {op}_fake, declared as {op}(Tensor x, float factor=2.0) -> Tensor"],
            id="fake_missing",
        ),
        pytest.param("def {op}_reference(", "def other(", ["must define {op}_reference"], id="reference_missing"),
        pytest.param("def {op}(x,", "def other(x,", ["must define {op}, declared as {op}("], id="launcher_missing"),
        pytest.param("def {op}_forward(", "def other(", ["must define {op}_forward"], id="forward_missing"),
        pytest.param("def {op}_backward(", "def other(", ["must define {op}_backward(ctx, *grads)"], id="no_backward"),
        pytest.param(
            "def {op}_fake(x, factor=2.0)",
            "def {op}_fake(x, scale=2.0)",
            ["{op}_fake(x, scale=2.0)", "{op}(Tensor x, float factor=2.0)", "make names, order and defaults agree"],
            id="name_differs",
        ),
        pytest.param(
            "def {op}_fake(x, factor=2.0)",
            "def {op}_fake(x, factor=1.0)",
            ["{op}_fake(x, factor=1.0)", "{op}(Tensor x, float factor=2.0)", "make names, order and defaults agree"],
            id="default_differs",
        ),
        pytest.param(
            "def {op}_fake(x, factor=2.0)",
            "def {op}_fake(factor=2.0, x=None)",
            ["{op}_fake(factor=2.0, x=None)", "{op}(Tensor x, float factor=2.0)"],
            id="order_differs",
        ),
        pytest.param(
            "def {op}_fake(x, factor=2.0)",
            "def {op}_fake(x)",
            ["{op}_fake(x)", "{op}(Tensor x, float factor=2.0)"],
            id="argument_missing",
        ),
        pytest.param(
            "def {op}_forward(ctx, x, factor)",
            "def {op}_forward(ctx, x)",
            ["{op}_forward(ctx, x)", "{op}(Tensor x, float factor=2.0)"],
            id="forward_argument_missing",
        ),
        pytest.param(
            "def {op}_fake(", "def {op}_check(x): pass\n\ndef {op}_fake(", ["{op}_check(x)"], id="check_differs"
        ),
    ],
)
def test_module_disagrees_with_schema(tmp_path: Path, request: pytest.FixtureRequest, old: str, new: str, says) -> None:
    op = request.node.callspec.id + "_case"
    assert old in MODULE
    file = user_file(tmp_path, op, MODULE.replace(old, new, 1))
    (spec,) = load_registry(file)
    with pytest.raises(RegistryError) as caught:
        spec.op(torch.ones(3))  # the module is imported, and checked, at the first call
    message = str(caught.value)
    assert message.startswith(f"{file}:1: ")
    for part in says:
        assert part.format(op=op) in message


def test_module_of_this_name_imported_from_elsewhere(tmp_path: Path) -> None:
    file = user_file(tmp_path, "shadowed", module="json")
    (tmp_path / "shadowed_module.py").rename(tmp_path / "json.py")
    import json

    (spec,) = load_registry(file)
    with pytest.raises(RegistryError) as caught:
        spec.op(torch.ones(3))
    assert str(caught.value).startswith(f"{file}:1: module 'json' is already imported from {json.__file__}")
    assert "rename one of the two" in str(caught.value)


def test_module_that_fails_to_import_is_not_left_half_imported(tmp_path: Path) -> None:
    (spec,) = load_registry(user_file(tmp_path, "broken", "raise RuntimeError('in the file of {op}')\n"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the file of broken"):
            spec.op(torch.ones(3))
    assert "broken_module" not in sys.modules


def test_unknown_op_name() -> None:
    with pytest.raises(KeyError, match="no registered op 'vector_ad'; did you mean tt::vector_add"):
        registry.spec("vector_ad")


# -- the shipped file -----------------------------------------------------------------------------------------------


def test_shipped_registry_is_the_one_at_the_top() -> None:
    root = registry.PACKAGE.parent / "op_registry.yaml"
    if not root.exists():
        pytest.skip("an installed package: there is no checkout around it")
    assert root.read_bytes() == registry.REGISTRY_FILE.read_bytes()


def test_shipped_registry_is_valid_and_registered() -> None:
    read = read_registry(registry.REGISTRY_FILE, registry.NAMESPACE)
    assert [spec.qualname for spec in read] == [spec.qualname for spec in specs()]
    assert read, "the registry is empty"


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_shipped_entry(spec: registry.OpSpec) -> None:
    assert spec.module, "imported, and every function agrees with its schema"
    assert spec.lesson in registry.LESSONS, "every shipped op is taught somewhere"
    source = urlsplit(spec.source or "")
    assert source.scheme == "https", spec.source
    assert "." in source.netloc, spec.source
    for suffix in ("samples", "error_samples", "bench_cases", "cost"):
        assert spec.function(suffix), f"{spec.name}_{suffix} is missing"
    assert len(registry.source_hash(spec)) == 16
    assert spec.module.__doc__, "the file begins with a docstring"


def test_sharding_names_are_the_rules() -> None:
    assert set(distributed.RULES) == set(registry.SHARDING)
