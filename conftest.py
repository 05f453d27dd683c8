"""How the tests run: one OpenMP thread in each process, the whole suite on every core, and no test by the clock."""

import os

import hypothesis
import pytest

# Ranks are forked from the test process, and OpenMP does not survive that with more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Examples take longer on a busy machine.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
_MOST_WORKERS = 8
# Whose files take longest: they start first, so that no core waits for another's at the end.
_LONGEST = ("integration_tests", "packages/training", "packages/models")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread the whole suite over the cores, file by file; a selection, `-n 0` and `--pdb` run in this process."""
    options = config.option
    whole_suite = not options.file_or_dir and not options.keyword and not options.usepdb
    if (
        whole_suite
        and config.pluginmanager.hasplugin("xdist")
        and options.numprocesses is None
        and "PYTEST_XDIST_WORKER" not in os.environ
    ):
        options.numprocesses = min(os.cpu_count() or 1, _MOST_WORKERS)
        options.dist = "loadfile"
        options.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which they should start."""
    items.sort(key=lambda item: next((n for n, each in enumerate(_LONGEST) if item.nodeid.startswith(each)), 3))
