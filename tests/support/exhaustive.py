"""Whether all is tried of which else only a part is: `make exhaustive`, before a release and when
the code under such a test changes. It takes hours; CI has less."""

import os

EXHAUSTIVE = os.environ.get("EXHAUSTIVE") == "1"
