"""Reads in the PTX of a kernel how a cluster merges splits, of which jax's interpreter sees nothing."""

from __future__ import annotations

import re

ARRIVE = "barrier.cluster.arrive.release.aligned"
WAIT = "barrier.cluster.wait.acquire.aligned"
READ = r"ld\.shared::cluster\S*"


def reads_of_others(ptx: str, splits: int) -> set[str]:
    """Returns the instructions that read other programs' memory, all of them between the barriers of the cluster.

    Before the first of these, everything is stored that others read; all splits are read.
    """
    _, arrived, rest = ptx.partition(ARRIVE)
    before, waited, rest = rest.partition(WAIT)
    reads, last, _ = rest.rpartition(WAIT)
    assert arrived
    assert waited
    assert last
    assert "st.shared" not in before
    assert ARRIVE in reads
    assert "ld.shared::cluster" not in ptx.replace(reads, "")
    assert set(re.findall(r"mapa\.shared::cluster\.u64.*, (\d+);", reads)) == set(map(str, range(splits)))
    return set(re.findall(READ, reads))
