"""What pytest must not collect: the kernels' modules import triton, which the library itself does without."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["gradsurg/linalg/kernels/*"]
