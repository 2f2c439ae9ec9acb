"""Shares: what part of a vector each member of a group sums, by hivemind's load balancing.

Apart from the exchange itself, since the solver is scipy's: 0.3 s and 30 MB that only members of runs need.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from hivemind.averaging.load_balancing import load_balance_peers

from swarm.light_modules import run_in_full

run_in_full("scipy.optimize")  # now, and not in the middle of an epoch, on the event loop

# A peer with less than this share of the fastest one's rate counts as if it had it: hivemind's solver fails below.
_MIN_RATE_RATIO = 1e-3
_SHARES = 2**20
# Less is not worth a stream from everybody.
_MIN_SHARE = _SHARES // 64


def share_out(rates: Sequence[float | None]) -> list[int]:
    """What part of the vector each member should sum, by hivemind's load balancing; the shares' sum is 2**20.

    rates: bytes per second that each can send. None: not measured, counts as the mean of the others. 0: reduces nothing.
    ValueError if all are 0, unless there is only one, who need not be reached.
    """
    if len(rates) == 1:
        return [_SHARES]
    if all(rate == 0 for rate in rates):
        raise ValueError("no member of the group can be reached by the others, so none can reduce")
    fastest = max((rate for rate in rates if rate), default=1.0)
    # hivemind's solver gives wrong parts for large figures, and the same part to everybody (the unreachable too) if it fails.
    # A rate is measured while others send, too: what differs by less than a factor of two is taken for equal.
    relative = [_power_of_two(max(rate / fastest, _MIN_RATE_RATIO)) if rate else rate for rate in rates]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "It is normal for this to happen occasionally"
        shares = load_balance_peers(_SHARES, relative, _MIN_SHARE)
    if any(share and rate == 0 for share, rate in zip(shares, rates, strict=True)):
        shares = load_balance_peers(_SHARES, [0.0 if rate == 0 else None for rate in rates])
    return [int(share) for share in shares]


def _power_of_two(ratio: float) -> float:
    return float(2.0 ** round(math.log2(ratio)))
