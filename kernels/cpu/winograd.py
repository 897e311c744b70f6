"""Winograd F(4x4, 3x3): a tile of 16 outputs from 36 products instead of 144, float32 only.

A tile has 6x6 inputs. TILES of them lie side by side, so that the transforms are sums of long rows; between them stand 36
products of panels, one a point. The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, as in csrc/winograd.h.
Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
"""

import numpy as np

from ..compile import inline, real
from ..scalars import activate
from .llvm import add_product
from .panels import U, aligned, copy_block, fill_block, inside

TILES = 64
GROUP = 16  # filters whose products are side by side
FILTERS = 64  # of one unit of work: they repay the transform of its tiles
KEPT = 4 << 20  # elements of transforms that are kept: 16 MiB
FEW = 16  # of a unit where all tiles are one panel, transformed once: their weights stay in cache, all threads have work
DOWN, ACROSS = 6 * TILES, TILES  # from row to row and from column to column of a tile
LARGEST = 1024  # channels: a block of transformed weights stays below 10 MB


def _transforms(step):
    """Of one dimension, for TILES tiles (weights: channels) side by side, whose elements are `step` apart: a constant."""

    @inline
    def inputs(source, at, to):
        for t in range(TILES):
            i = U(at) + U(t)
            d0, d1, d2 = source[i], source[i + U(step)], source[i + U(2 * step)]
            d3, d4, d5 = source[i + U(3 * step)], source[i + U(4 * step)], source[i + U(5 * step)]
            even1, odd1 = d4 - real(2) * d2, (d3 - real(2) * d1) * real(0.70710678)
            even2, odd2 = d4 - real(0.5) * d2, (d3 - real(0.5) * d1) * real(1.41421356)
            to[i], to[i + U(5 * step)] = (d0 - real(2.5) * d2) + d4, (d1 - real(2.5) * d3) + d5
            to[i + U(step)], to[i + U(2 * step)] = even1 + odd1, even1 - odd1
            to[i + U(3 * step)], to[i + U(4 * step)] = even2 + odd2, even2 - odd2

    @inline
    def weights(source, at, to):
        for t in range(TILES):
            i = U(at) + U(t)
            g0, g1, g2 = source[i], source[i + U(step)], source[i + U(2 * step)]
            even1, odd1 = (g0 + real(0.5) * g2) * real(-2 / 3), g1 * real(1.41421356 / 3)
            even2, odd2 = (g0 + real(2) * g2) * real(1 / 6), g1 * real(1.41421356 / 6)
            to[i], to[i + U(5 * step)] = g0, g2
            to[i + U(step)], to[i + U(2 * step)] = even1 - odd1, even1 + odd1
            to[i + U(3 * step)], to[i + U(4 * step)] = even2 + odd2, even2 - odd2

    @inline
    def outputs(source, at, to):
        for t in range(TILES):
            i = U(at) + U(t)
            m1, m2, m3, m4 = source[i + U(step)], source[i + U(2 * step)], source[i + U(3 * step)], source[i + U(4 * step)]
            even1, odd1, even2, odd2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
            to[i], to[i + U(step)] = source[i] + (even1 + even2), real(0.70710678) * odd1 + real(1.41421356) * odd2
            to[i + U(2 * step)] = real(0.5) * even1 + real(2) * even2
            to[i + U(3 * step)] = (real(0.35355339) * odd1 + real(2.82842712) * odd2) + source[i + U(5 * step)]

    return inputs, weights, outputs


inputs_down, weights_down, outputs_down = _transforms(DOWN)
inputs_across, weights_across, outputs_across = _transforms(ACROSS)


@inline
def _move_rows(source, at, step, to, to_at, pitch, rows):
    """to[to_at + r * pitch + t] = source[at + r * step + t], for TILES t."""
    for r in range(rows):
        a, b = U(at + r * step), U(to_at + r * pitch)
        for t in range(TILES):
            to[b + U(t)] = source[a + U(t)]


@inline
def _transform_weights(w, f, adjoint, C, patch, points, to, at, pitch):
    """to[at + point * pitch + c] of filter f; with `adjoint` f counts the inputs of the filters and c the filters."""
    for first in range(0, C, TILES):
        n = min(TILES, C - first)
        for c in range(n):
            for k in range(9):
                patch[k // 3 * DOWN + k % 3 * ACROSS + c] = w[first + c, f, 8 - k] if adjoint else w[f, first + c, k]
        for j in range(3):
            weights_down(patch, j * ACROSS, points)
        for i in range(6):
            weights_across(points, i * DOWN, patch)
        copy_block(patch, 0, TILES, 1, to, at + first, pitch, 36, n)


@inline
def _transform_inputs(x1, plane, H, W, top, left, tiles, lines, patch, at):
    """A row of tiles of a plane, from place `at` on of those in patch, padded."""
    pitch = 4 * tiles + 2
    (h0, h1), (w0, w1) = inside(top, 1, H, 6), inside(left, 1, W, pitch)
    if h1 - h0 < 6 or w1 - w0 < pitch:
        fill_block(lines, 0, pitch, 6, pitch, real(0))
    copy_block(x1, (plane * H + top + h0) * W + left + w0, W, 1, lines, h0 * pitch + w0, pitch, h1 - h0, w1 - w0)
    for t in range(tiles):
        for i in range(6):
            for j in range(6):
                patch[U(i * DOWN + j * ACROSS + at + t)] = lines[U(i * pitch + 4 * t + j)]


@inline
def is_winograd(x, y, taps, stride, pad, dilation, C, F, exact):
    """Whether the algorithm is allowed and pays: an image is cut into tiles, which come in panels of TILES."""
    N, (OD, OH, OW) = x.shape[0], y.shape[2:]
    if exact or x.itemsize > 4 or taps != (1, 3, 3) or stride != (1, 1, 1) or dilation != (1, 1, 1) or min(C, F) < 16:
        return False
    if OD != 1 or x.shape[2] != 1 or pad[0] or C > LARGEST:
        return False
    panels = (N * ((OH + 3) // 4) * ((OW + 3) // 4) + TILES - 1) // TILES
    return panels * TILES * 36 * 1.25 + 100 < N * OH * OW * 9


@inline
def winograd(begin, end, units, x, w, b, y, groups, pad_h, pad_w, adjoint, activation):
    """The part [begin, end) of `units` of the convolution; with `adjoint` by the filters' transpose."""
    N, _, _, H, W = x.shape
    OH, OW, C, F = y.shape[3], y.shape[4], x.shape[1] // groups, y.shape[1] // groups
    high, wide = (OH + 3) // 4, (OW + 3) // 4
    panels = (N * high * wide + TILES - 1) // TILES
    size = FILTERS if panels > 1 else FEW
    blocks = (F + size - 1) // size
    x1, y1, w4 = x.reshape(x.size), y.reshape(y.size), w.reshape((groups, w.shape[0] // groups, w.shape[1], 9))
    patch, points, lines = aligned(6 * DOWN, x), aligned(6 * DOWN, x), np.empty(6 * (4 * wide + 2), x.dtype)
    patch[:] = real(0)
    pitch = (C + 1) * TILES  # of a point's panel: not a power of two, so that points do not share cache sets
    # Whose transforms are all kept: the weights', if there are many panels and each thread has some of them, or the inputs'.
    by_panels = panels > 3 and F * 36 * C <= KEPT
    kept_u, kept_v = blocks if by_panels else 1, panels if not by_panels and panels * 36 * pitch <= KEPT else 1
    turned, panel = aligned(kept_u * size * 36 * C, x), aligned(kept_v * 36 * pitch, x)
    weights_of, inputs_of, products = np.full(kept_u, -1), np.full(kept_v, -1), aligned(GROUP * 6 * DOWN, x)
    parts = groups * blocks * panels
    for unit in range(begin * parts // units, end * parts // units):
        g = unit // (blocks * panels)
        p, block = (unit // blocks % panels, unit % blocks) if by_panels else (unit % panels, unit // panels % blocks)
        first, u_at, v_at = block * size, block % kept_u * size * 36 * C, p % kept_v * 36 * pitch
        count, filters = min(TILES, N * high * wide - p * TILES), min(size, F - first)
        if weights_of[block % kept_u] != g * blocks + block:
            weights_of[block % kept_u] = g * blocks + block
            for f in range(filters):
                at = u_at + f // GROUP * 36 * GROUP * C + f % GROUP * C
                _transform_weights(w4[g], first + f, adjoint, C, patch, points, turned, at, GROUP * C)
        if inputs_of[p % kept_v] != g * panels + p:
            inputs_of[p % kept_v] = g * panels + p
            for c in range(C):
                t = 0
                while t < count:
                    tw, row = (p * TILES + t) % wide, (p * TILES + t) // wide
                    run = min(wide - tw, count - t)
                    plane, top = row // high * groups * C + g * C + c, row % high * 4 - pad_h
                    _transform_inputs(x1, plane, H, W, top, tw * 4 - pad_w, run, lines, patch, t)
                    t += run
                for j in range(6):
                    inputs_down(patch, j * ACROSS, points)
                for i in range(6):
                    inputs_across(points, i * DOWN, patch)
                _move_rows(patch, 0, TILES, panel, v_at + c * TILES, pitch, 36)
        for f in range(0, filters, GROUP):
            rows = min(GROUP, filters - f)
            products[:] = real(0)
            for point in range(36):
                at = u_at + (f // GROUP * 36 + point) * GROUP * C
                add_product(turned, at, C, 1, panel, v_at + point * pitch, TILES, products, point * TILES, 6 * DOWN, rows, count, C)
            for i in range(rows):
                channel, at = g * F + first + f + i, i * 6 * DOWN
                for j in range(6):
                    outputs_down(products[at : at + 6 * DOWN], j * ACROSS, points)
                for k in range(4):
                    outputs_across(points, k * DOWN, patch)
                bias = b[channel] if len(b) else real(0)
                for t in range(4 * DOWN):
                    patch[t] += bias
                for t in range(4 * DOWN if activation else 0):
                    patch[t] = activate(patch[t], activation)
                _write_tiles(patch, y1, y.shape[1], channel, OH, OW, p * TILES, count, high, wide)


@winograd.float64
def winograd(begin, end, units, x, w, b, y, groups, pad_h, pad_w, adjoint, activation):
    """Never asked for."""


@inline
def _write_tiles(patch, y1, planes, channel, OH, OW, first, count, high, wide):
    """The outputs of `count` tiles, in patch side by side, of a channel of images of so many planes."""
    for t in range(count):
        tw, row = (first + t) % wide, (first + t) // wide
        top, left = row % high * 4, tw * 4
        at = ((row // high * planes + channel) * OH + top) * OW + left
        if top + 4 <= OH and left + 4 <= OW:  # numbers that the compiler knows
            for i in range(4):
                for j in range(4):
                    y1[U(at + i * OW + j)] = patch[U(i * DOWN + j * ACROSS + t)]
        else:
            for i in range(min(4, OH - top)):
                for j in range(min(4, OW - left)):
                    y1[U(at + i * OW + j)] = patch[U(i * DOWN + j * ACROSS + t)]
