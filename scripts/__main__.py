# SPDX-License-Identifier: Apache-2.0
"""``python -m scripts VERB``; the verbs are in a module of their own, which processes of a pool can import."""

import sys

from scripts.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
