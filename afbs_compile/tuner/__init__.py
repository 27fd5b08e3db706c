"""AFBS-BO: from captured Q, K and V to validated thresholds per head.

``space`` what is searched · ``measure`` error and sparsity of a choice · ``explore``, ``refine``, ``validate`` the
three stages of ``method="afbs"`` · ``paper`` Algorithm 1 as printed · ``speed`` whether it pays · ``site`` one site ·
``graph`` all sites of a graph.
"""
