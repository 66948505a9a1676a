import inspect
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from gpp.runtime import stdlib_functions
from gpp.runtime.data import DataError, majority_share
from gpp.runtime.stdlib_functions import StdlibFunctions, build, functions

BOUNDS = {"name": 8, "signature": 10, "docstring": 12, "body": 20}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def real(cache: Path) -> StdlibFunctions:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return StdlibFunctions(name=32, docstring=128, body=192)


def library(root: Path, **modules: str) -> Path:
    for name, source in modules.items():
        path = root / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    return root


def defined(*names: str) -> str:
    return "\n".join(f"def {name}(): return {name}" for name in names)


def texts(arrays: dict[str, np.ndarray], key: str) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode() for row in arrays[key]]


def test_this_interpreters_library(real: StdlibFunctions) -> None:
    batch = real.read(range(len(real)), real.keys)
    assert {k: tuple(v.shape[1:]) for k, v in batch.items()} == {
        "name": (32,),
        "signature": (64,),
        "docstring": (128,),
        "body": (192,),
        "label": (),
    }
    assert all(
        value.dtype == torch.int64 and value.min() >= 0 and value.max() < 256 for value in batch.values()
    )
    assert len(real) > 2000
    assert len(real.modules) == 16 and "test" not in real.modules
    assert set(batch["label"].tolist()) == set(range(16))
    assert 1 / 16 < majority_share(batch["label"]) < 0.4
    assert torch.all(batch["name"][:, 0] > 0)


def test_a_function_that_is_known_to_be_there(real: StdlibFunctions) -> None:
    from logging import Logger

    label = real.modules.index("logging")
    batch = real.read(range(len(real)), real.keys)
    name = b"setLevel".ljust(32, b"\0")
    rows = [
        i for i, row in enumerate(batch["name"]) if bytes(row.tolist()) == name and batch["label"][i] == label
    ]
    documented = {bytes(batch["docstring"][i].tolist()).rstrip(b"\0").decode() for i in rows}
    assert inspect.getdoc(Logger.setLevel)[:128] in documented


def test_samples_of_a_module_differ(real: StdlibFunctions) -> None:
    batch = real.read(range(len(real)), real.keys)
    rows = torch.cat([batch[key].view(len(real), -1) for key in real.keys], dim=1)
    assert len(torch.unique(rows, dim=0)) == len(real)


def test_only_what_is_asked_for_is_read(real: StdlibFunctions) -> None:
    read = real.read([5, 5, 0], ["body", "label"])
    assert list(read) == ["body", "label"] and torch.equal(read["body"][0], read["body"][1])
    with pytest.raises(DataError, match="no key 'path'; it has name, signature, docstring, body, label"):
        real.read([0], ["path"])
    with pytest.raises(DataError, match=f"no sample {len(real)}"):
        real.read([len(real)], ["name"])


SOURCE = '''
import os

@decorated
def first(a, b: int = 2, *args, **more) -> str:
    """Says hello.

        Indented.
    Done.
    """
    x = 1
    if x:  # why
        return "é\x0c"

class Outer:
    async def method(self): return await self
    class Inner:
        def deep(self):
            """Only words."""
        def long(
            self,
        ):
            # before
            text = """a
  b"""
            def within(): pass
            return text  # after

if os.name == "posix":
    def guarded(): ...
else:
    try:
        def tried(): pass
    except OSError:
        def caught(): pass
'''


def test_the_four_modalities() -> None:
    found = [tuple(text.decode() for text in function) for function in functions(SOURCE.encode())]
    assert found == [
        (
            "first",
            "a, b: int=2, *args, **more -> str",
            "Says hello.\n\n    Indented.\nDone.",
            'x = 1\nif x:  # why\n    return "é\x0c"',
        ),
        ("method", "self", "", "return await self"),
        ("deep", "self", "Only words.", ""),
        ("long", "self", "", 'text = """a\n  b"""\ndef within(): pass\nreturn text'),
        ("guarded", "", "", "..."),
        ("tried", "", "", "pass"),
        ("caught", "", "", "pass"),
    ]


@pytest.mark.parametrize("source", [b"def f(:\n", b"def f(): return '\xff'", b"\0"])
def test_a_file_of_another_python_has_no_functions(source: bytes) -> None:
    assert list(functions(source)) == []


def test_the_largest_modules_are_taken(tmp_path: Path) -> None:
    root = library(
        tmp_path,
        small=defined("a"),
        big__in__one=defined("a", "b"),
        big__in__sub__in__two=defined("c"),
        middle=defined("a", "b"),
        boasts='"""\n' + "def f(): pass\n" * 9 + '"""\n' + defined("a"),
        repeats=defined(*"aaaaaaaa"),
    )
    arrays = build(root, 2, BOUNDS)
    assert arrays["modules"].tolist() == ["big", "middle"]
    assert list(zip(arrays["label"].tolist(), texts(arrays, "name"), strict=True)) == [
        (0, "a"),
        (0, "b"),
        (0, "c"),
        (1, "a"),
        (1, "b"),
    ]


def test_texts_are_cut_or_padded(tmp_path: Path) -> None:
    root = library(tmp_path, one='def a_long_name(x, y=10):\n    "Doc."\n    return x + y + 1000000')
    arrays = build(root, 1, BOUNDS)
    assert {key: arrays[key].shape for key in BOUNDS} == {key: (1, bound) for key, bound in BOUNDS.items()}
    assert [texts(arrays, key) for key in BOUNDS] == [
        ["a_long_n"],
        ["x, y=10"],
        ["Doc."],
        ["return x + y + 10000"],
    ]


def test_tests_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    skipped = ("site-packages__in__p", "test__in__p", "a__in__tests__in__p", "idlelib__in__idle_test__in__p")
    root = library(tmp_path, a=defined("kept"), **{name: defined("x", "y") for name in skipped})
    assert texts(build(root, 1, BOUNDS), "name") == ["kept"]


def test_too_few_modules_are_refused(tmp_path: Path) -> None:
    root = library(tmp_path, one=defined("a"), none="x = 1")
    with pytest.raises(
        DataError, match=r"sources of 2 modules .* has 1: install them, or lower data.classes"
    ):
        build(root, 2, BOUNDS)


def test_a_bound_must_be_positive() -> None:
    with pytest.raises(DataError, match="body of the stdlib data set must be at least 1, it is 0"):
        StdlibFunctions(body=0)


class TestCache:
    @pytest.fixture(autouse=True)
    def _small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built = 0
        self.root = library(tmp_path / "library", a=defined("f", "g"), b=defined("h"))
        self.home = tmp_path / "home"

        def counting(path: Path, classes: int, bounds: dict[str, int]) -> dict[str, np.ndarray]:
            self.built += 1
            return build(self.root, classes, bounds)

        monkeypatch.setattr(stdlib_functions, "build", counting)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.home))

    def names(self, **bounds: int) -> list[str]:
        data = StdlibFunctions(classes=2, **bounds)
        read = data.read(range(len(data)), ["name"])["name"].tolist()
        return [bytes(row).rstrip(b"\0").decode() for row in read]

    def file(self) -> Path:
        (found,) = (self.home / "gpp").iterdir()
        return found

    def test_the_second_time_nothing_is_built(self) -> None:
        assert self.names() == self.names() == ["f", "g", "h"]
        assert self.built == 1
        assert self.file().suffix == ".npz"

    def test_other_bounds_are_another_cache(self) -> None:
        assert self.names(name=4) == self.names(name=5)
        assert self.built == 2

    @pytest.mark.parametrize("damage", ["empty", "text", "half", "keys", "pickle"])
    def test_a_damaged_cache_is_built_again(self, damage: str) -> None:
        self.names()
        path = self.file()
        content = path.read_bytes()
        match damage:
            case "empty" | "text" | "half":
                path.write_bytes(
                    {"empty": b"", "text": b"no archive", "half": content[: len(content) // 2]}[damage]
                )
            case "keys":
                np.savez(path, name=np.zeros(3))
            case "pickle":
                keys = (*StdlibFunctions.keys, "modules")
                np.savez(path, **{key: np.array([{"an": "object"}]) for key in keys})
        assert self.names() == ["f", "g", "h"]
        assert self.built == 2
        assert path.read_bytes() == content

    def test_a_folder_that_cannot_be_written_costs_only_time(self) -> None:
        self.home.write_text("a file, no folder")
        assert self.names() == self.names() == ["f", "g", "h"]
        assert self.built == 2

    def test_many_may_start_at_once(self) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: self.names(), range(40)))
        assert all(names == ["f", "g", "h"] for names in found)
        assert self.file().suffix == ".npz"
