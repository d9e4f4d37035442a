"""How the op library is built: once, alone, again when sources change, and not at all without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ds_serve.attention import builder
from ds_serve.attention.backends import select_backend

# The smallest library that Python can import; VALUE tells one build from another.
SOURCE = """
#include <Python.h>
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, nullptr};
PyMODINIT_FUNC JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "value", VALUE);
  return module;
}
"""


@pytest.fixture
def workshop(monkeypatch, tmp_path):
    """An empty extension directory and sources of our own; yields the sources' directory."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "tiny.cpp").write_text("#define VALUE 1\n" + SOURCE)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(builder, "CSRC", csrc)
    monkeypatch.setattr(builder, "FLAGS", ("-O0",))
    builder.load_ops.cache_clear()
    yield csrc
    builder.load_ops.cache_clear()


def test_builds_once_and_again_when_sources_change(workshop, monkeypatch, capfd):
    first = builder.load_ops()
    assert first.value == 1 and builder.load_ops() is first
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/no/such/compiler")  # what is built already needs none
        builder.load_ops.cache_clear()
        assert builder.load_ops().value == 1
    (workshop / "tiny.cpp").write_text("#define VALUE 2\n" + SOURCE)
    builder.load_ops.cache_clear()
    assert builder.load_ops().value == 2
    assert capfd.readouterr().out == ""


def test_two_processes_and_a_lock_left_by_a_killed_build(workshop):
    directory = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / builder.DsServeOpBuilder().name
    directory.mkdir(parents=True)
    (directory / "lock").touch()
    program = (
        "from pathlib import Path\n"
        "from ds_serve.attention import builder\n"
        f"builder.CSRC, builder.FLAGS = Path({str(workshop)!r}), ('-O0',)\n"
        "assert builder.load_ops().value == 1\n"
    )
    root = Path(builder.__file__).parents[2]
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=root) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]


@pytest.mark.parametrize("fault", ["no compiler", "a source that does not compile"])
def test_failure_warns_once_and_the_reference_is_used(workshop, monkeypatch, fault):
    if fault == "no compiler":
        monkeypatch.setenv("CXX", "/no/such/compiler")
    else:
        (workshop / "tiny.cpp").write_text("int f() { return nonsense; }")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert builder.load_ops() is None
        assert select_backend("cpu", torch.float32, 16).name == "reference"
        assert select_backend("cpu", torch.float32, 16).name == "reference"
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert ("/no/such/compiler" if fault == "no compiler" else "nonsense") in messages[0]
    with pytest.raises(RuntimeError, match="could not be built"):
        select_backend("cpu", torch.float32, 16, "cpu")
