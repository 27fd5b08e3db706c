"""The passes that a captured graph goes through, in this order; each is one function in a file of its name.

Data goes one way: a pass may import the ones above it in :data:`ORDER`, never one below.
"""

ORDER = (
    "expand",  # nn.MultiheadAttention and nn.TransformerEncoderLayer are opened, so that their attention is seen
    "find",  # every attention call: a site in canonical form, or a refusal with its reason
    "capture",  # Q, K and V of each site on sample inputs; skipped where a recipe is at hand
    "unmask",  # calls that stay dense lose a mask that was proven causal: is_causal=True says the same
    "rewrite",  # planned sites become afbs::sparse_attention with each head's constants in the call
    "lower",  # inductor
)
"""Module names, in the order of the pipeline; between ``capture`` and ``rewrite`` stands the tuner."""
