"""Where the tests find their data: what is shipped in `tests/data`, and larger recordings where there are any.

The larger ones are looked for in `shared/` beside the repository; the variable MAGICFACE_RT_RECORDINGS names another
folder with `goldens/` and `cases/` in it.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
SHARED = Path(os.environ.get("MAGICFACE_RT_RECORDINGS", ROOT.parent / "shared"))
GOLDENS = SHARED / "goldens"
CASES = SHARED / "cases"
