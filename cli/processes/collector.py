"""What the garbage collector of a process that runs for long need not look at again and again."""

import gc

#: Allocations that survive until the collector looks, and its looks at the young until it goes on
#: to older ones: cycles are few here, and what is in flight comes and goes by thousands.
_THRESHOLDS = 10_000, 20, 20


def spare_what_is_loaded() -> None:
    """Call when everything is imported, before the loop runs.

    Modules and their code stay. Where the collector walks them, the loop stands still: 60 ms for
    each full collection, under load once every few seconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
