"""What a captured graph goes through: ``expand``, marks, ``find``, ``capture``, ``rewrite`` with ``unmask``, ``lower``.

:mod:`afbs_compile.backend` runs them; docs/architecture.md draws the pipeline.
"""
