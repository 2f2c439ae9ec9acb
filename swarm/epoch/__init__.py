"""The epoch: who leads it, who computes what, what counts, and when everybody steps. Pure: no sockets, clocks, dice or tensors.

    messages.py     what members say to each other, and Commit, the outcome of an epoch
    ledger.py       which microbatches a replica has added
    coordinator.py  leases, counts, fences, and runs the round: one epoch in the eyes of the member that leads it
    member.py       what every participant does: obeys the highest term, leads when it is its turn, holds, steps

A Member is fed events (`apply`) and answers with actions; swarm.training.membership carries them out.
"""
