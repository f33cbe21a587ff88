"""What a bare ``pytest --nbval-lax notebooks`` needs: the settings under which the outputs were stored."""
from __future__ import annotations

import os

from p2p_helpers.course import CELL_SECONDS, KERNEL_ENVIRONMENT

NBVAL_DEFAULT_SECONDS = 2000

# The kernel is a child of this process and inherits what is set here; what the caller has set wins.
for name, value in KERNEL_ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def pytest_configure(config):
    option = config.option
    if not (option.nbval or option.nbval_lax):
        return
    if not option.nbval_kernel_name:
        option.nbval_current_env = True
    if option.nbval_cell_timeout == NBVAL_DEFAULT_SECONDS:
        option.nbval_cell_timeout = CELL_SECONDS


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
