"""`python -m fastbert`: the console script's program.

Python imports the package ahead of this file, and the package torch, so that here it is too late to say how threads
wait (see `fastbert_main`): where nobody has said it, the process starts itself once more with that in its environment.
"""

import os
import sys

from fastbert_main import main, set_waiting

if set_waiting():
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
main()
