"""What README says runs as it stands does."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_thirty_lines_run_and_print_a_table_and_a_verdict(capsys):
    section = README.split("## Thirty lines, from an old model to a verdict")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("| old/old |", "| new/old |", "| new/new |"))
    assert printed.strip().splitlines()[-1][0].isupper()  # the verdict's title
