# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The running softmax of the Hopper kernel, written for what waits for what: a consumer has nothing else to do.

Rows of scores lie in four neighbouring threads each, two rows to a thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEEP = gl.constexpr(2.0**28)
"""Scores, in log2 units, from which on the power of two above the scale takes its place; see :func:`follow`."""

SLACK = gl.constexpr(4.0)
"""How far, in log2 units, scores may lie above what is subtracted from them before that follows.

Rounding c m adds up to 8, and 2^12 fits fp16.
"""

LOWEST = gl.constexpr(-3.4028234663852886e38)
"""The lowest finite fp32."""


def _rescaling(count: int) -> str:
    """PTX that multiplies ``count`` registers unless every factor in the warp is one; a thread has two."""
    return "\n".join(
        (
            "{",
            ".reg .pred some, other;",
            f"setp.neu.f32 some, ${2 * count}, 0f3F800000;",
            f"setp.neu.f32 other, ${2 * count + 2}, 0f3F800000;",
            "or.pred some, some, other;",
            "vote.sync.any.pred some, some, 0xffffffff;",
            "@!some bra keep;",
            *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
            "keep:",
            "}",
        )
    )


def _operands(count: int) -> str:
    """Constraints of :func:`_rescaling`: registers that are written, the same ones read, and a factor for each."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


# Registers of a thread: 64 rows of HEAD_DIM numbers, 128 threads.
RESCALE_32, OPERANDS_32 = gl.constexpr(_rescaling(32)), gl.constexpr(_operands(32))
RESCALE_64, OPERANDS_64 = gl.constexpr(_rescaling(64)), gl.constexpr(_operands(64))


@gluon.jit
def lowest(steep, ROWS: gl.constexpr, rows_of: gl.constexpr):
    """What is subtracted in rows that have seen no key: finite, and so is its product with ``steep``."""
    return gl.zeros([ROWS], gl.float32, layout=rows_of) + gl.where(steep > 1.0, -(2.0**127) / steep, LOWEST)


@gluon.jit
def row_maxima(x, rows_of: gl.constexpr):
    """Maximum of each row: first over every sixteenth column, four maxima a row and thread that need not wait."""
    part = gl.max(x.reshape([x.shape[0], x.shape[1] // 16, 16]), 1)
    return gl.convert_layout(gl.max(part, 1), rows_of, assert_trivial=True)


@gluon.jit
def part_sums(x):
    """Sums of each row over every eighth column, which stay in their threads until the tile's end."""
    return gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 8]), 1)


@gluon.jit
def row_sums(parts, rows_of: gl.constexpr):
    """Sums of the rows of :func:`part_sums`."""
    return gl.convert_layout(gl.sum(parts, 1), rows_of, assert_trivial=True)


@gluon.jit
def decayed(parts, decay):
    """Partial sums times the factors of their rows."""
    rows_of: gl.constexpr = gl.SliceLayout(1, parts.type.layout)
    return parts * gl.convert_layout(decay, rows_of, assert_trivial=True)[:, None]


@gluon.jit
def follow(scores, peak, scale, steep):
    """A step's running maxima m, and the c, c m and decay that follow from them.

    m follows a row's maximum only when that has left it ``SLACK`` behind: then most steps rescale nothing, and the
    weights carry a factor that sums and output share.
    """
    rows_of: gl.constexpr = peak.type.layout
    # Rounding c m is a factor on the row, no larger than rounding s itself, until it is so large that it overflows.
    # Beyond 2^28 neighbouring scores lie 16 log2 units apart and the largest take all, whatever the scale: there c is
    # the power of two above it, which rounds nothing.
    edge = STEEP / scale
    slack = gl.where(gl.abs(peak) < edge, SLACK / scale, SLACK / steep)
    highest = row_maxima(scores, rows_of)
    new_peak = gl.where(highest > peak + slack, highest, peak)
    # Both products at once: fewer instructions wait for each other.
    gentle = gl.abs(new_peak) < edge
    c = gl.where(gentle, scale, steep)
    shift = gl.where(gentle, new_peak * scale, new_peak * steep)
    return new_peak, c, shift, gl.exp2((peak - new_peak) * c)


@gluon.jit
def exponents(scores, c, shift):
    """c s - c m, one instruction each."""
    rows_of: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    c = gl.convert_layout(c, rows_of, assert_trivial=True)
    shift = gl.convert_layout(shift, rows_of, assert_trivial=True)
    return scores * c[:, None] - shift[:, None]


@gluon.jit
def rescale(acc, decay):
    """``acc`` times the factors of its rows."""
    factor = gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))
    _, factors = gl.broadcast(acc, factor[:, None])
    if acc.shape[1] == 64:
        acc = gl.inline_asm_elementwise(
            RESCALE_32, OPERANDS_32, [acc, factors], dtype=gl.float32, is_pure=False, pack=32
        )
    else:
        acc = gl.inline_asm_elementwise(
            RESCALE_64, OPERANDS_64, [acc, factors], dtype=gl.float32, is_pure=False, pack=64
        )
    return acc


@gluon.jit
def halves(x):
    """Left and right columns."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def join(left, right):
    """The inverse of :func:`halves`."""
    return gl.join(left, right).permute((0, 2, 1)).reshape([left.shape[0], 2 * left.shape[1]])
