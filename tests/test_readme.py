"""The README's tables say what the stored figures say."""

import subprocess
import sys
from pathlib import Path

TABLES = Path(__file__).parents[1] / "benchmarks" / "tables.py"


def test_the_tables_are_those_of_the_stored_figures():
    result = subprocess.run([sys.executable, str(TABLES), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr or "run python benchmarks/tables.py"
