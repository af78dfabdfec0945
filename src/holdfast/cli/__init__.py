"""The command line: `holdfast ls | show | diff | verify | restore | export | tag | pin | rm |
prune | gc | doctor | rehearse`.

Each command is a file that parses, makes one call of the library and renders the
result as a table or, with `--json`, as one JSON object. Importing this package imports
neither NumPy nor a framework: the library is imported by the command that runs.
"""

from __future__ import annotations

from holdfast.cli.app import cli as cli
from holdfast.cli.app import main as main
