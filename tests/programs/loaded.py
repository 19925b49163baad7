"""Import modules and print, a line each, which of the named ones are loaded by that.

python -m tests.programs.loaded MODULE,MODULE... NAME...
"""

import importlib
import sys

for module in sys.argv[1].split(","):
    importlib.import_module(module)
print(*(name for name in sys.argv[2:] if name in sys.modules), sep="\n")
