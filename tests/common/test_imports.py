"""The garbage collector pauses during imports, and collects again afterwards."""

import gc
import subprocess
import sys

import pytest

from common.imports import lazy_imports, pause_collection, resume_collection


@pytest.fixture(autouse=True)
def collecting():
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()  # as for all tests


def test_a_program_collects_garbage_after_its_imports_and_leaves_them_alone():
    pause_collection()
    assert not gc.isenabled()
    resume_collection()
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()
    resume_collection()  # of a program that did not pause
    assert gc.get_freeze_count() == 0


def test_lazy_imports_pause_the_collector_even_if_one_fails(monkeypatch):
    with pytest.raises(ModuleNotFoundError), lazy_imports():
        assert not gc.isenabled()
        import no_such_module  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with lazy_imports():
        monkeypatch.setitem(sys.modules, "one_more_module", sys)
    assert gc.isenabled() and gc.get_freeze_count() > 0


def test_lazy_imports_do_not_resume_a_paused_collector():
    gc.disable()
    with lazy_imports():
        pass
    assert not gc.isenabled()


def test_each_program_collects_garbage_while_it_works():
    code = "import gc; from common.errors import begin_program, exit_code_of; begin_program(); "
    code += "before = gc.isenabled(); exit_code_of(lambda: print(before, gc.isenabled()))"
    ran = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]
