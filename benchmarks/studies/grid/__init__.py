"""The grid of layers, ranks, rows and popularities, sgmv beside every peer.

    cases -> run -> records -> table, figures, readme, goals

`command` has the way of a run.
"""
