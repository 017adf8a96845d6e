from __future__ import annotations

from services.prompts.stdlib import library_functions, split_of

LONG_FUNCTION = '''
def {name}(value):
    """Say what it does."""
    first = value + 1
    second = first + 1
    third = second + 1
    fourth = third + 1
    fifth = fourth + 1
    return fifth
'''


def write(folder, *modules):
    for module in modules:
        (folder / f"{module}.py").write_text(LONG_FUNCTION.format(name="work"))


def test_function_is_cut_after_its_docstring_and_before_what_is_no_indentation(tmp_path):
    write(tmp_path, "alpha")
    (function,) = library_functions(tmp_path)
    assert function.name == "alpha.work"
    assert function.given == 'def work(value):\n    """Say what it does."""\n    '
    assert function.rest.startswith("first = value + 1\n    second")
    assert function.rest.endswith("    return fifth")
    assert function.conversation() == [
        {"role": "user", "content": function.given},
        {"role": "assistant", "content": function.rest},
    ]


def test_splits_part_the_modules_by_name_and_keep_the_order(tmp_path):
    modules = [f"module{number}" for number in range(40)]
    write(tmp_path, *modules)
    everything = list(library_functions(tmp_path))
    assert [function.module for function in everything] == sorted(modules)
    for split in ("train", "heldout"):
        part = list(library_functions(tmp_path, split=split))
        assert part == [function for function in everything if function.split == split]
        assert part
        assert all(split_of(function.module) == split for function in part)


def test_broken_and_foreign_files_are_passed_over(tmp_path):
    write(tmp_path, "alpha")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "tests").mkdir()
    write(tmp_path / "tests", "beta")
    assert [function.module for function in library_functions(tmp_path)] == ["alpha"]
