"""AFBS-BO: from captured Q, K and V to validated thresholds per head, or to one threshold for all of them.

``inputs`` the inputs of a site and passes over them · ``curves`` what a pass measures · ``explore``, ``validate`` the
stages of ``method="afbs"`` on curves · ``lengths``, ``promise`` what they say about other inputs · ``end_to_end``,
``budget``, ``family``, ``threshold``, ``budgeted`` a budget on the output, spent by one threshold for all heads ·
``space``, ``measure``, ``gp``, ``paper`` Algorithm 1 as printed, by evaluations · ``speed`` whether it pays · ``site``
one site · ``graph`` all sites of a graph.
"""
