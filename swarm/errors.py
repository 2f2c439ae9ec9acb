"""Every error that leaves this project, by who must act.

    SwarmError
    |- UserError        the user: a wrong name, path, flag or machine setting
    |  |- ModelNotFound     no such model or checkpoint
    |  |- JoinFailed        no initial peer can be reached
    |  |- RouteBroken       nobody (alive) serves some blocks, or the deadline passed
    |  `- SessionFull       the text is longer than the session's cache; never retry
    |- PeerFailed       another peer: this one vanished, stalled or cannot go on
    |  `- BadReply          another peer, and blame this one: it answered nonsense
    |- Busy             the same peer, later: it is full just now
    |- Outdated         whoever told us where to go: that peer is in another epoch by now
    |- MicrobatchGone   the same peer, now: it needs the microbatch's input again
    `- BadRequest       nobody: a bug of ours, or an incompatible version; never retry

Every message names the cause and the next step.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base class. str(error) is one line that a user can read."""


class UserError(SwarmError):
    """The user must change something; retrying as is cannot help."""


class ModelNotFound(UserError):
    """No checkpoint, hub repository or alias of that name can be had."""


class JoinFailed(UserError):
    """No initial peer answered before the deadline, or this machine cannot take part."""


class RouteBroken(UserError):
    """No chain of living peers covers all blocks. Retry once nodes have joined."""


class SessionFull(UserError):
    """The session's cache cannot hold more tokens. Open one with a larger max_length."""


class PeerFailed(SwarmError):
    """This peer vanished, stalled, or lost what we had with it; another peer can take over."""


class BadReply(PeerFailed):
    """This peer answered something that cannot be right; avoid it."""


class Busy(SwarmError):
    """This peer has no room now; another peer, or the same one later."""


class SessionEvicted(Busy):
    """This peer ended the session to make room for an older one; open another, there or elsewhere, and replay."""


class MicrobatchGone(SwarmError):
    """This peer keeps nothing (any more) of a microbatch; send its input again with the gradient."""


class Outdated(SwarmError):
    """This peer has other weights, obeys another leader or keeps another ledger by now; nothing is wrong with it."""


class BadRequest(SwarmError):
    """The peer understood us and refused: our bug or an incompatible version. Never retried."""
