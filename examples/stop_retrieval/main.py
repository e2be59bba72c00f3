#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Text-video retrieval with STOP and token merging: training, evaluation and search, by STOP's flags.

python main.py --output_dir output/try           a small model on synthetic videos, 90 seconds on two cores
python main.py --help                            all flags
"""

import sys

from retrieval.run import main

if __name__ == "__main__":
    sys.exit(main())
