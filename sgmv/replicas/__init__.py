"""Many servers behind a router, simulated by compiled code: requests are numbers, time is an event.

    trace ──router──> replica 0:  waiting ──admit──> running     its own slots and host memory
            placement replica 1:  ...
                      replica 2:  ...                            may fail, and return empty

`lists` is the order in which a replica evicts, `scheduler` what it admits, `replica` its steps,
`router` where a request goes, `events` the loop over all of them. One replica does what
`sgmv.serving.simulate` does, event for event; `sgmv.serving.simulate_replicas` is the way in.

This folder holds compiled code alone: the stamp on what is cached of it is made from its files.
"""
