import sys

import pytest

from pml_compat._extras import import_extra


def test_returns_the_module():
    assert import_extra("xml.dom", "demo") is sys.modules["xml.dom"]


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_missing_package_gives_the_pip_command(module):
    expected = r'^no_such_package is not installed; run: pip install "pml-compat\[timm\]"$'
    with pytest.raises(ImportError, match=expected):
        import_extra(module, "timm")


@pytest.mark.parametrize("content", ["import no_such_dependency", "from json import no_such_name"])
def test_an_installed_but_broken_package_keeps_its_own_error(content, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=content.split()[-1]) as error:
        import_extra("broken_package", "demo")
    assert "pip install" not in str(error.value)


def test_missing_part_of_an_installed_package_keeps_its_own_error():
    with pytest.raises(ModuleNotFoundError, match=r"xml\.no_such_part") as error:
        import_extra("xml.no_such_part", "demo")
    assert "pip install" not in str(error.value)
