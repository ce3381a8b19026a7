"""`python -m tinyllm.testing.mutants`."""

import sys

from tinyllm.testing.mutants.command import main

sys.exit(main())
